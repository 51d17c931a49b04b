"""Folders of users without a home, or without a name."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import pytest

from serve_app.cli.command_error import CommandError
from serve_app.cli.state import state_directory
from serve_app.home import ensure_home, expanded, home
from serve_app.models.cache import cache_directory
from serve_app.models.model_error import ModelError

VARIABLES = ("SERVE_APP_CACHE", "SERVE_APP_STATE", "XDG_CACHE_HOME", "XDG_STATE_HOME")


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A number that no table knows, without HOME; where such a user's folders would be."""
    for name in ("HOME", *VARIABLES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"serve_app-{os.geteuid()}"


def test_a_known_user_has_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert home() == Path("/somewhere")
    assert expanded("~/x/y") == Path("/somewhere/x/y")
    assert expanded("x/~/y") == Path("x/~/y")
    assert expanded("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")


def test_one_without_a_home_has_a_private_folder(stranger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert home() == stranger
    assert stat.S_IMODE(stranger.stat().st_mode) == 0o700
    assert cache_directory() == stranger / ".cache" / "serve_app"
    assert cache_directory("~/models") == stranger / "models"
    assert state_directory() == stranger / ".local" / "state" / "serve_app"
    monkeypatch.setenv("HOME", "x")  # for monkeypatch to take back what comes now
    monkeypatch.delenv("HOME")
    ensure_home()
    assert os.environ["HOME"] == str(stranger)


def test_that_folder_is_never_somebody_elses(stranger: Path) -> None:
    stranger.symlink_to("/tmp")
    with pytest.raises(ModelError, match="set cache_dir"):
        cache_directory()
    with pytest.raises(CommandError, match="set SERVE_APP_STATE to a folder that you can write"):
        state_directory()
    with pytest.raises(OSError, match="it is no folder"):
        ensure_home()
