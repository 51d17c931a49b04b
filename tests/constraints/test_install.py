"""Who installs, and where torch comes from: with a pip and a uv that only note what they are asked."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "constraints" / "install.py"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere PyPI's torch is a build for CPUs")

NOTES = """
import json, os, sys
with open(os.environ["NOTES"], "a") as file:
    file.write(json.dumps([NAME, *sys.argv[1:]]) + "\\n")
"""
PIP = """
if sys.argv[1:] == ["config", "list"]:
    print(os.environ.get("PIP_SETTINGS", ""))
else:
    sys.exit(int(os.environ.get("PIP_STATUS", "0")))
"""
PROGRAM = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("install", sys.argv[1])
install = importlib.util.module_from_spec(spec)
spec.loader.exec_module(install)
install.CPU_INDEX, install.ANSWERS_WITHIN_S = sys.argv[2], 2.0
install.has_gpu.__defaults__ = (Path(sys.argv[3]),)
sys.exit(install.main(sys.argv[4:]))
"""


class Index:
    """A package index that answers with `status`, or, with none, never."""

    def __init__(self) -> None:
        self.status: int | None = 200
        self.asked: list[str] = []
        self.closing = Event()
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                index.asked.append(self.path)
                if index.status is None:
                    index.closing.wait()
                    return
                self.send_response(index.status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                """Silence."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/whl/cpu"


@pytest.fixture
def index() -> Iterator[Index]:
    running = Index()
    Thread(target=running.server.serve_forever, daemon=True).start()
    yield running
    running.closing.set()
    running.server.shutdown()
    running.server.server_close()


class Machine:
    """Runs the script on a machine of its own making."""

    def __init__(self, folder: Path, index: Index) -> None:
        self.root, self._bin, self._index = folder / "root", folder / "bin", index
        (self.root / "dev").mkdir(parents=True)
        self._bin.mkdir()
        (folder / "pip").mkdir()
        (folder / "pip" / "__init__.py").touch()  # else the real one would come first
        (folder / "pip" / "__main__.py").write_text("NAME = 'pip'\n" + NOTES + PIP)
        self._notes = folder / "notes"
        self.environment = {
            "PATH": str(self._bin),
            "PYTHONPATH": str(folder),
            "NOTES": str(self._notes),
            "HOME": str(folder),
        }

    def has(self, program: str) -> None:
        """Put a program on the PATH."""
        path = self._bin / program
        path.write_text(f"#!{sys.executable}\nNAME = {program!r}\n{NOTES}")
        path.chmod(0o755)

    def install(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", PROGRAM, str(SCRIPT), self._index.url, str(self.root), *arguments]
        return subprocess.run(
            command, cwd=self.root, env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )

    @property
    def asked(self) -> list[list[str]]:
        """What pip and uv were asked to install: the program, and its arguments."""
        noted = [json.loads(line) for line in self._notes.read_text().splitlines()]
        return [words for words in noted if words[1:3] != ["config", "list"]]


@pytest.fixture
def machine(tmp_path: Path, index: Index) -> Machine:
    return Machine(tmp_path, index)


PIP_INSTALL = ["pip", "install", "--disable-pip-version-check"]
PROJECT = ["--no-build-isolation", "--editable"]


def test_without_a_gpu_torch_comes_from_pytorchs_index(machine: Machine, index: Index) -> None:
    done = machine.install("--constraint", "cpu.txt", ".[dev]")
    assert done.returncode == 0
    common = [*PIP_INSTALL, "--extra-index-url", index.url, "--constraint", "cpu.txt"]
    assert machine.asked == [[*common, "setuptools"], [*common, *PROJECT, ".[dev]"]]
    assert index.asked == ["/whl/cpu/torch/"]
    assert f"torch comes from {index.url} (192 MB)" in done.stderr


@pytest.mark.parametrize("status", [404, 503, None])
def test_an_index_that_does_not_answer_is_done_without(machine: Machine, index: Index, status: int | None) -> None:
    index.status = status
    done = machine.install()
    assert done.returncode == 0
    assert machine.asked == [[*PIP_INSTALL, "setuptools"], [*PIP_INSTALL, *PROJECT, "."]]
    assert f"{index.url} does not answer: torch comes with CUDA, 2.7 GB to fetch in place of 192 MB" in done.stderr


@pytest.mark.parametrize("sign", ["nvidia-smi", "dev/nvidia0", "proc/driver/nvidia", "--gpu"])
def test_with_a_gpu_nothing_is_asked(machine: Machine, index: Index, sign: str) -> None:
    if sign == "nvidia-smi":
        machine.has(sign)
    elif not sign.startswith("-"):
        (machine.root / sign).mkdir(parents=True)
    assert machine.install(*[sign] if sign.startswith("-") else []).returncode == 0
    assert machine.asked[1] == [*PIP_INSTALL, *PROJECT, "."]
    assert index.asked == []


@pytest.mark.parametrize("more", [[], ["--gpu"]])
def test_an_index_that_is_named_is_taken(machine: Machine, index: Index, more: list[str]) -> None:
    machine.environment["PIP_SETTINGS"] = "global.index-url='https://a.mirror/simple'"
    machine.install("--torch-index", "https://an.index", *more)
    assert machine.asked[1] == [*PIP_INSTALL, "--extra-index-url", "https://an.index", *PROJECT, "."]
    assert index.asked == []


@pytest.mark.parametrize("setting", ["global.index-url", ":env:.find-links", "user.extra_index_url", "site.no-index"])
@pytest.mark.parametrize("uv", [False, True])
def test_a_pip_that_was_told_where_to_look_is_obeyed(machine: Machine, index: Index, setting: str, uv: bool) -> None:
    machine.environment["PIP_SETTINGS"] = f"global.timeout='9'\n{setting}='somewhere'"
    if uv:
        machine.has("uv")  # which does not read pip's settings
    machine.install()
    assert machine.asked == [[*PIP_INSTALL, "setuptools"], [*PIP_INSTALL, *PROJECT, "."]]
    assert index.asked == []


def test_uv_installs_where_it_is(machine: Machine, index: Index) -> None:
    machine.has("uv")
    machine.install("--constraint", "cpu.txt")
    common = ["uv", "pip", "install", "--python", sys.executable, "--extra-index-url", index.url]
    common += ["--index-strategy", "unsafe-best-match", "--constraint", "cpu.txt"]
    assert machine.asked == [[*common, "setuptools"], [*common, *PROJECT, "."]]


def test_pip_reaches_pypi_through_what_it_was_told_and_torch_comes_from_pytorch(machine: Machine, index: Index) -> None:
    machine.environment["PIP_SETTINGS"] = "global.proxy='http://proxy'"
    machine.has("uv")
    machine.install()
    assert machine.asked[1] == [*PIP_INSTALL, "--extra-index-url", index.url, *PROJECT, "."]


@pytest.mark.parametrize(
    ("written", "asked"),
    [
        (b'[pip]\nextra-index-url = ["https://a.mirror"]', False),
        (b"[pip]\nno-index = true", False),
        (b'[pip]\nindex-strategy = "first-index"', True),
        (b"# no index here: \xff", True),
    ],
)
def test_of_uvs_file_the_places_count(machine: Machine, index: Index, written: bytes, asked: bool) -> None:
    machine.has("uv")
    (machine.root / "uv.toml").write_bytes(written)
    assert machine.install().returncode == 0
    assert bool(index.asked) is asked


@pytest.mark.parametrize("told", ["UV_INDEX_URL", "UV_TORCH_BACKEND", "uv.toml"])
def test_a_uv_that_was_told_where_to_look_is_obeyed(machine: Machine, index: Index, told: str) -> None:
    machine.has("uv")
    if told == "uv.toml":
        folder = Path(machine.environment["HOME"], ".config", "uv")
        folder.mkdir(parents=True)
        (folder / told).write_text('[[index]]\nurl = "https://a.mirror/simple"\n')
    else:
        machine.environment[told] = "https://a.mirror/simple" if told == "UV_INDEX_URL" else "cpu"
    machine.install()
    assert machine.asked[1] == ["uv", "pip", "install", "--python", sys.executable, *PROJECT, "."]
    assert index.asked == []


HASHED = ["--require-hashes", "--no-deps", "--only-binary", ":all:", "--requirement"]


def locks(folder: Path, torch: str) -> str:
    """A lock, with one beside it that pins this version of torch."""
    (folder / "torch.txt").write_text(f"triton==3.0\ntorch=={torch} ; sys_platform != 'win32' \\\n")
    return str(folder / "runtime.txt")


@pytest.mark.parametrize("why", ["gpu", "silent", "answers", "told", "named", "here"])
def test_with_a_lock_all_but_torch_has_a_hash_and_so_has_torch_from_pypi(
    machine: Machine, index: Index, tmp_path: Path, why: str
) -> None:
    index.status = 503 if why == "silent" else 200
    machine.environment["PIP_SETTINGS"] = "global.find-links='/wheels'" if why == "told" else ""
    lock = locks(tmp_path, torch=importlib.metadata.version("torch").partition("+")[0] if why == "here" else "1.0")
    more = {"gpu": ["--gpu"], "named": ["--torch-index", index.url]}.get(why, [])
    assert machine.install("--constraint", "cpu.txt", "--lock", lock, *more, ".[dev]").returncode == 0
    hashed = [[*PIP_INSTALL, *HASHED, lock]]
    if why in ("gpu", "silent"):
        hashed.append([*PIP_INSTALL, *HASHED, str(tmp_path / "torch.txt")])
    place = ["--extra-index-url", index.url] if why in ("answers", "named") else []
    torch = [*PIP_INSTALL, *place, "--constraint", "cpu.txt", "torch"]
    assert machine.asked == [*hashed, torch, [*PIP_INSTALL, "--no-deps", *PROJECT, ".[dev]"]]
    assert bool(index.asked) is (why in ("silent", "answers"))


def test_a_lock_that_does_not_fit_says_what_to_do(machine: Machine, tmp_path: Path) -> None:
    machine.environment["PIP_STATUS"] = "1"
    done = machine.install("--lock", locks(tmp_path, torch="1.0"))
    assert done.returncode == 1
    assert len(machine.asked) == 1
    assert "files of its own" in done.stderr
    assert "`make ... HASHES=` installs the same versions" in done.stderr


def test_an_installation_that_fails_ends_it(machine: Machine) -> None:
    machine.environment["PIP_STATUS"] = "7"
    assert machine.install().returncode == 7
    assert len(machine.asked) == 1


def test_the_index_alone(machine: Machine, index: Index) -> None:
    assert machine.install("--print-torch-index").stdout == f"{index.url}\n"
    assert machine.asked == []


@pytest.fixture
def install() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_settings_of_a_real_pip(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "https://a.mirror/simple")
    monkeypatch.setenv("PIP_CLIENT_CERT", "/a/file")
    assert {"extra-index-url", "client-cert"} <= install.pip_settings()


@pytest.mark.parametrize(("version", "works"), [("", True), ("0.1", False)], ids=["installed", "another"])
def test_what_is_set_up_needs_no_network_to_be_set_up_again(
    install: ModuleType, tmp_path: Path, version: str, works: bool
) -> None:
    """With the real pip: a hash is compared only where there is a file to fetch."""
    lock = tmp_path / "runtime.txt"
    lock.write_text(f"PyYAML=={version or importlib.metadata.version('PyYAML')} --hash=sha256:{64 * '0'}\n")
    command = [*install.installer(None, ""), "--no-index", "--dry-run", *install._HASHED, str(lock)]
    assert (install.run(command) == 0) is works


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed (Debian: apt install make)")
@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["serve"], "--constraint constraints/cpu.txt --lock constraints/locks/runtime.txt ."),
        (["serve", "GPU=1"], "--constraint constraints/gpu.txt --gpu --lock constraints/locks/runtime.txt ."),
        (["serve", "HASHES="], "--constraint constraints/cpu.txt ."),
        (
            ["test", "TORCH_INDEX=https://x"],
            "--constraint constraints/cpu.txt --torch-index 'https://x' "
            "--lock constraints/locks/development.txt '.[dev]'",
        ),
    ],
)
def test_make_says_what_it_is_for(tmp_path: Path, words: list[str], command: str) -> None:
    dry = ["make", "--dry-run", "--no-print-directory", f"VENV={tmp_path}", *words]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    printed = subprocess.run(dry, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=True)
    said = " ".join(printed.stdout.replace("\\\n", " ").split())
    assert f"{tmp_path}/bin/python constraints/install.py {command} " in f"{said} "


def pins(path: Path) -> dict[str, str]:
    """Versions by normal names."""
    found = re.findall(r"^([\w.-]+)==([^\s;]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {normal(name): version for name, version in found}


def normal(name: str) -> str:
    """As indexes compare names."""
    return re.sub(r"[-_.]+", "-", name).lower()


ELSEWHERE = {"async-timeout", "colorama", "httpx2-jsfetch"}
"""Of Pythons and systems that are not supported."""


def test_the_locks_hold_what_is_pinned() -> None:
    """`make lock` writes them."""
    folder = SCRIPT.parent
    cpu, gpu = pins(folder / "cpu.txt"), pins(folder / "gpu.txt")
    runtime, development, torch = (
        pins(folder / "locks" / f"{name}.txt") for name in ("runtime", "development", "torch")
    )
    assert {name: version for name, version in development.items() if name not in ELSEWHERE} == {
        name: version for name, version in cpu.items() if name != "torch"
    }
    assert runtime.items() <= development.items()
    assert "setuptools" in runtime, "it builds the project"
    assert torch == {**gpu, "torch": cpu["torch"], "triton": cpu["triton"]}


def test_each_pinned_version_has_a_hash() -> None:
    for path in (SCRIPT.parent / "locks").iterdir():
        for requirement in re.split(r"\n(?=\w)", path.read_text(encoding="utf-8"))[1:]:
            assert "--hash=sha256:" in requirement, requirement


def test_what_the_project_needs_is_in_the_locks() -> None:
    """The project is installed without looking at what it needs. `make lock` sees to versions too."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    extras = [requirement for extra in project["optional-dependencies"].values() for requirement in extra]
    for lock, requirements in {"runtime": project["dependencies"], "development": extras}.items():
        locked = pins(SCRIPT.parent / "locks" / f"{lock}.txt").keys() | {"torch", "serve-app"}
        assert {normal(re.split(r"[^\w.-]", requirement)[0]) for requirement in requirements} <= locked
