"""The folder of a running service: nobody else's, and gone afterwards."""

from __future__ import annotations

import errno
import os
import secrets
import stat
import tempfile
from pathlib import Path
from typing import Any

import pytest

from serve_app.cli.command_error import CommandError
from serve_app.cli.private_folder import private_folder, remove_noted
from serve_app.cli.state import claim, remove_what_crashes_left

NODE_ID = "f" * 56
HAPROXYS_SUFFIX = ".4194304.tmp"


def test_only_its_owner_can_enter_and_it_is_gone_afterwards(tmp_path: Path) -> None:
    note = tmp_path / "note"
    before = os.umask(0)
    try:
        with private_folder(note) as folder:
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            assert folder.stat().st_uid == os.getuid()
            assert note.read_text() == str(folder)
            (folder / "x").mkdir()
            (folder / "x" / "admin.sock").touch()
    finally:
        os.umask(before)
    assert not folder.exists()
    assert not note.exists()


@pytest.mark.parametrize("own", ["/tmp", "/tmp/" + "long" * 20])
def test_sockets_in_it_have_paths_that_are_short_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str
) -> None:
    monkeypatch.setattr(tempfile, "gettempdir", lambda: own)
    with private_folder(tmp_path / "note") as folder:
        assert len(f"{folder}/{NODE_ID}/a.sock{HAPROXYS_SUFFIX}") < 108


@pytest.mark.parametrize("kind", ["folder", "link", "file"])
def test_what_somebody_made_first_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(tempfile, "gettempdir", lambda: "/tmp")
    monkeypatch.setattr(secrets, "token_hex", lambda _: f"taken{os.getpid()}")
    taken = Path("/tmp") / f"sa-taken{os.getpid()}"
    if kind == "folder":
        taken.mkdir(mode=0o777)
    elif kind == "link":
        taken.symlink_to(tmp_path)
    else:
        taken.touch()
    try:
        with pytest.raises(CommandError, match="can't be made"), private_folder(tmp_path / "note"):
            pass
    finally:
        taken.rmdir() if kind == "folder" else taken.unlink()


def test_what_a_crash_left_goes_at_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVE_APP_STATE", str(tmp_path))
    left = []
    for port in (8000, 8001):
        with claim(port) as held:
            folder = Path(tempfile.mkdtemp(prefix="sa-"))
            held.note.write_text(str(folder))  # and then it is killed
            held.launcher.touch()
            left.append(folder)
    with claim(8000) as held:
        remove_what_crashes_left()
        assert left[0].exists()  # a service that runs has it
        assert not left[1].exists()
        with private_folder(held.note) as folder:
            assert not left[0].exists()
            assert folder.exists()
    remove_what_crashes_left()
    assert not list((tmp_path / "servers").glob("*.folder"))
    assert not (tmp_path / "servers" / "8001.haproxy").exists()
    assert not folder.exists()


def test_what_a_note_names_is_removed_only_where_it_is_ours(tmp_path: Path) -> None:
    note = tmp_path / "note"
    for name in ("documents", "sa-link"):
        precious = tmp_path / name
        if name == "sa-link":
            precious.symlink_to(tmp_path / "documents")
        else:
            precious.mkdir()
        note.write_text(str(precious))
        remove_noted(note)
        assert precious.exists()
        assert not note.exists()


def test_the_notes_of_another_user_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a state folder that several share. Root, who may open all files, runs tests too."""
    monkeypatch.setenv("SERVE_APP_STATE", str(tmp_path))
    folders = [Path(tempfile.mkdtemp(prefix="sa-")) for _ in range(2)]
    (tmp_path / "servers").mkdir()
    for port, folder in enumerate(folders, 8000):
        (tmp_path / "servers" / f"{port}.folder").write_text(str(folder))
    usual = Path.open

    def refuse(path: Path, *arguments: Any, **more: Any) -> Any:
        if path.name.startswith("8000."):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return usual(path, *arguments, **more)

    monkeypatch.setattr(Path, "open", refuse)
    remove_what_crashes_left()
    assert [folder.exists() for folder in folders] == [True, False]
    folders[0].rmdir()
