"""A pytest plugin: how the tests are shared out when several processes run them (`pytest -n 3`).

A file stays together, since its tests share what takes long to make. Files with tests of the Ray cluster go to few
processes: each of these starts a cluster of its own, and mostly waits for it. The others do all other files, in which
those help when no file of the cluster is left. pytest-xdist's own groups (3.8) are no help: they rename tests in a way
that pytest 9.2 does not notice.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

_LONGEST = (
    "deployments/test_failover.py",
    "loadtest/test_chaos.py",
    "deployments/test_resume.py",
    "deployments/test_node_drain.py",
    "deployments/test_responses.py",
    "deployments/test_draining.py",
)
"""Ends of paths: these begin, so that no long one is what all wait for at the end."""


@cache
def needs_cluster(path: Path) -> bool:
    """Whether a file has tests of the Ray cluster."""
    return re.search(r"^(pytestmark = .*|@pytest\.)mark\.ray\b", path.read_text(), re.MULTILINE) is not None


def turn(path: Path) -> tuple[bool, int]:
    """Files with a lower one begin earlier."""
    longest = (number for number, end in enumerate(_LONGEST) if path.as_posix().endswith(end))
    return not needs_cluster(path), next(longest, len(_LONGEST))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """pytest-xdist's hook: the scheduler that hands out the files."""
    config.option.loadscopereorder = False  # it would begin with the file that has the most tests
    return _scheduler_class()(config, log)


@cache
def _scheduler_class() -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        """Hands out whole files, those of the cluster to at most two processes, and to all but one."""

        _clusters: set[Any]
        """Processes that were given a file with tests of the cluster."""

        def __init__(self, config: pytest.Config, log: Any) -> None:
            super().__init__(config, log)
            self._clusters = set()

        def _split_scope(self, nodeid: str) -> str:
            return nodeid.partition("::")[0]

        def _assign_work_unit(self, node: Any) -> None:
            """Give `node` the next file that it may have; without one it ends."""
            most = max(1, min(2, self.numnodes - 1))
            may_use_cluster = node in self._clusters or len(self._clusters) < most
            for file in self.workqueue:
                if may_use_cluster or not needs_cluster(self.config.rootpath / file):
                    break
            else:
                node.shutdown()
                return
            if needs_cluster(self.config.rootpath / file):
                self._clusters.add(node)
            self.workqueue.move_to_end(file, last=False)
            super()._assign_work_unit(node)

        def remove_node(self, node: Any) -> str | None:
            self._clusters.discard(node)  # before its files go to the others
            crashed: str | None = super().remove_node(node)
            return crashed

    return Files


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put what takes longest first."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: turn(item.path))
