"""The address of a cluster that has ended: found, and said."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray._common.utils import get_ray_address_file

from serve_app.cli.ray_address import address_file, stale_address


@pytest.fixture
def listening() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def dead(listening: str) -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def note(folder: Path, address: str) -> Path:
    file = folder / "ray" / "ray_current_cluster"
    file.parent.mkdir()
    file.write_text(address)
    return file


@pytest.mark.parametrize(
    "variables", [{}, {"TMPDIR": "/a"}, {"RAY_TMPDIR": "/b"}, {"TMPDIR": "/a", "RAY_TMPDIR": "/b"}]
)
def test_the_file_is_rays_own(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TMPDIR", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert address_file(os.environ) == Path(get_ray_address_file(None))


def test_a_cluster_that_has_ended_is_said(tmp_path: Path, dead: str) -> None:
    file = note(tmp_path, dead)
    said = stale_address({"RAY_TMPDIR": str(tmp_path)})
    assert said is not None
    assert f"{file} names a Ray cluster that does not answer any more ({dead})" in said
    assert f"rm {file}" in said


def test_what_is_no_address_does_not_answer(tmp_path: Path) -> None:
    note(tmp_path, "")
    assert stale_address({"RAY_TMPDIR": str(tmp_path)}) is not None


def test_a_cluster_that_lives_is_none_of_our_business(tmp_path: Path, listening: str) -> None:
    note(tmp_path, listening)
    assert stale_address({"RAY_TMPDIR": str(tmp_path)}) is None
    assert stale_address({"RAY_TMPDIR": str(tmp_path / "elsewhere")}) is None
