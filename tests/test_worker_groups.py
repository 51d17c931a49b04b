"""Which process gets which file of tests."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import worker_groups

CLUSTER = "import pytest\n\npytestmark = [pytest.mark.ray, pytest.mark.demo]\n"
ONE_OF_THE_CLUSTER = "import pytest\n\n\n@pytest.mark.ray\ndef test_a(): ...\n"
OTHER = '"""Says `pytest.mark.ray`."""\n\nSCRIPT = """\n    @pytest.mark.ray\n"""\n'


class Process:
    """A worker of pytest-xdist that runs nothing until `run` is called."""

    def __init__(self) -> None:
        self.gateway = SimpleNamespace(id="gw")
        self.files: list[str] = []
        self.shutting_down = False
        self.left: list[int] = []

    def send_runtest_some(self, indices: list[int]) -> None:
        self.left += indices

    def shutdown(self) -> None:
        self.shutting_down = True


class Session:
    """All files in `folder`, two tests in each, and as many processes."""

    def __init__(self, folder: Path, processes: int) -> None:
        files = sorted(folder.rglob("*.py"), key=lambda path: (worker_groups.turn(path), path))
        self.tests = [f"{file.relative_to(folder)}::test_{n}" for file in files for n in range(2)]
        option = SimpleNamespace(loadscopereorder=True)
        config: Any = SimpleNamespace(option=option, rootpath=folder, getvalue=lambda _: [f"{processes}*popen"])
        self.scheduler = worker_groups.pytest_xdist_make_scheduler(config, None)
        self.processes = [Process() for _ in range(processes)]
        for process in self.processes:
            self.scheduler.add_node(process)
            self.scheduler.add_node_collection(process, self.tests)
        self.scheduler.schedule()

    def run(self, process: Process) -> bool:
        """Let it run its next test. False: it has none."""
        if not process.left:
            return False
        index = process.left.pop(0)
        file = self.tests[index].partition("::")[0]
        if file not in process.files:
            process.files.append(file)
        self.scheduler.mark_test_complete(process, index)
        return True

    def run_all(self) -> list[list[str]]:
        """In turns; the files of each process."""
        running = [process for process in self.processes if process in self.scheduler.nodes]
        while running:
            running = [process for process in running if self.run(process)]
        return [process.files for process in self.processes]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(4):
        (tmp_path / f"test_cluster_{number}.py").write_text(ONE_OF_THE_CLUSTER if number % 2 else CLUSTER)
        (tmp_path / f"test_other_{number}.py").write_text(OTHER)
    (tmp_path / "deployments").mkdir()
    (tmp_path / "deployments" / "test_resume.py").write_text(CLUSTER)
    return tmp_path


@pytest.mark.parametrize(("processes", "clusters"), [(1, 1), (2, 1), (3, 2), (4, 2)])
def test_every_file_runs_once_and_few_processes_have_a_cluster(folder: Path, processes: int, clusters: int) -> None:
    files = Session(folder, processes).run_all()
    assert sorted(file for each in files for file in each) == sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*.py")
    )
    assert files[0][0] == "deployments/test_resume.py", "a long one begins"
    assert sum(any(worker_groups.needs_cluster(folder / file) for file in each) for each in files) == clusters


def test_who_has_no_file_of_the_cluster_left_helps_with_the_others(folder: Path) -> None:
    session = Session(folder, 2)
    while session.run(session.processes[0]):
        pass
    assert [path for path in session.processes[0].files if "other" in path]


def test_a_process_that_may_have_no_cluster_ends_when_only_such_files_are_left(folder: Path) -> None:
    for other in folder.glob("test_other_*"):
        other.unlink()
    session = Session(folder, 3)
    assert [process.shutting_down for process in session.processes] == [False, False, True]
    assert sum(map(len, session.run_all())) == 5


def test_the_files_of_a_process_that_dies_go_to_another(folder: Path) -> None:
    session = Session(folder, 3)
    dead = session.processes[0]
    session.run(dead)
    assert session.scheduler.remove_node(dead) == "deployments/test_resume.py::test_1"
    session.processes.append(successor := Process())
    session.scheduler.add_node(successor)
    session.scheduler.add_node_collection(successor, session.tests)
    session.scheduler.schedule()
    ran = session.run_all()
    assert {file for each in ran for file in each} == {str(path.relative_to(folder)) for path in folder.rglob("*.py")}
