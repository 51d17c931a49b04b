"""The blocking client is the asynchronous one in other words: the file in the repository is what the script writes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "unasync.py"


@pytest.fixture
def unasync() -> ModuleType:
    pytest.importorskip("ruff", reason="ruff is not installed (pip install 'serve_app[dev]')")
    spec = importlib.util.spec_from_file_location("unasync", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_file_is_up_to_date(unasync: ModuleType) -> None:
    for source, target in unasync.TWINS.items():
        made = unasync.blocking(source.read_text(encoding="utf-8"), target)
        assert target.read_text(encoding="utf-8") == made, f"{source.name} was changed: run `make client`"


def test_nothing_asynchronous_is_left(unasync: ModuleType) -> None:
    for target in unasync.TWINS.values():
        code = target.read_text(encoding="utf-8").removeprefix(unasync.NOTICE.format(target=target.name))
        assert not [line for line in code.splitlines() if "async" in line.lower() or "await" in line]
