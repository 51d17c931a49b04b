"""The fake server, and a state folder of its own for each test."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_api import FakeApi, fake_api


@pytest.fixture
def api() -> Iterator[FakeApi]:
    with fake_api() as running:
        yield running


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "state"
    monkeypatch.setenv("SERVE_APP_STATE", str(folder))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of the tests")  # no file in the home folder of who runs the tests,
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")  # nor one in the folder of their services
    return folder
