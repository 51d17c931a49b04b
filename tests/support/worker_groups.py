"""A pytest plugin: how the tests are shared out when several processes run them (`pytest -n 2`).

All files with tests of the session's one Ray cluster go to one process, which begins with them: they mostly wait. Of
the others a file stays together, since its tests share what takes long to make. pytest-xdist's own groups (3.8) are no
help: they rename tests in a way that pytest 9.2 does not notice.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

RAY = "ray"


@cache
def group_of(path: Path) -> str:
    """The group of a file of tests."""
    return RAY if "mark.ray" in path.read_text() else str(path)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """pytest-xdist's hook: hands out whole groups, in the order in which they were collected."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(config.rootpath / nodeid.partition("::")[0])

    return Groups(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the largest group first, so that it is not what all wait for at the end."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: group_of(item.path) != RAY)
