"""Where a Ray of our own keeps its files: where no other user can write, and within the length of a socket's path."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest

from serve_app.cli import ray_folder as module
from serve_app.cli.command_error import CommandError
from serve_app.cli.ray_folder import ray_folder

NAME = f"serve_app-{os.geteuid()}"


@pytest.fixture(autouse=True)
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pytest's own folders have long names."""
    monkeypatch.setattr(module, "MAX_BYTES", len(os.fsencode(tmp_path)) + 30)


def test_nobody_else_can_write_to_it(tmp_path: Path) -> None:
    assert ray_folder({}, tmp_path) == {"RAY_TMPDIR": str(tmp_path / NAME)}
    assert stat.S_IMODE((tmp_path / NAME).stat().st_mode) == 0o700


@pytest.mark.skipif(sys.platform != "linux", reason="Ray heeds TMPDIR on Linux alone")
def test_it_is_in_tmpdir_where_that_will_do(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    assert ray_folder({"TMPDIR": str(tmp_path / "own")}, tmp_path) == {"RAY_TMPDIR": str(tmp_path / "own" / NAME)}
    long = tmp_path / ("long" * 8)
    long.mkdir()
    for bad in (str(long), "/nowhere"):
        assert ray_folder({"TMPDIR": bad}, tmp_path) == {"RAY_TMPDIR": str(tmp_path / NAME)}
    assert not Path("/nowhere").exists()


def test_the_users_own_choice_is_left_alone(tmp_path: Path) -> None:
    assert ray_folder({"RAY_TMPDIR": str(tmp_path)}, Path("/nowhere")) == {}
    with pytest.raises(CommandError, match="RAY_TMPDIR /nowhere can't be written by this user; set it to another"):
        ray_folder({"RAY_TMPDIR": "/nowhere"}, tmp_path)
    with pytest.raises(CommandError, match="has a path of more than"):
        ray_folder({"RAY_TMPDIR": str(tmp_path / ("long" * 8))}, tmp_path)


def test_what_another_user_has_made_is_not_used(tmp_path: Path) -> None:
    (tmp_path / NAME).symlink_to("/tmp")
    with pytest.raises(CommandError, match=r"Ray can't keep its files: .* it is no folder; set RAY_TMPDIR"):
        ray_folder({}, tmp_path)


def test_the_usual_place_is_short_enough() -> None:
    assert len(f"/tmp/serve_app-4294967294{module._LONGEST_WITHIN}") <= 107
