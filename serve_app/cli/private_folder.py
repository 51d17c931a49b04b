"""A folder that only this user can enter, for sockets and configurations of a running service.

Promises that no other user made the folder, and that it is removed when the service has ended: by the process that made
it, or, after a crash, by the next command. Paths of Unix sockets have 108 bytes at most, so it is a short one.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from serve_app.cli.command_error import CommandError

_PLACE_BYTES = 16
"""Longest path of the parent folder: to a socket's path Ray adds a node id (56 bytes), HAProxy a temporary suffix."""
_REMOVAL_S = 5.0
"""How long processes of a service that has ended may still write into its folder."""
_RETRY_S = 0.1


@contextmanager
def private_folder(note: Path) -> Iterator[Path]:
    """A new folder of mode 0700 under a name that nobody can foresee, for as long as the block runs.

    `note` is a file that names it meanwhile. Raises `CommandError` where no folder can be made.
    """
    remove_noted(note)  # the folder of a service that was killed
    place = tempfile.gettempdir()
    folder = Path(place if len(os.fsencode(place)) <= _PLACE_BYTES else "/tmp", f"sa-{secrets.token_hex(4)}")
    try:
        note.write_text(str(folder), encoding="utf-8")  # before the folder: no crash leaves one that no note names
        folder.mkdir(mode=0o700)  # fails where anything has the name
    except OSError as error:
        raise CommandError(f"{folder} can't be made ({error.strerror}); HAProxy needs it for its sockets") from error
    try:
        yield folder
    finally:
        remove_noted(note)


def remove_noted(note: Path) -> None:
    """Remove the folder that `note` names, if it is this user's own, and the note."""
    try:
        folder = Path(note.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    deadline = time.monotonic() + _REMOVAL_S
    while _is_ours(folder):
        shutil.rmtree(folder, ignore_errors=True)
        if folder.exists():
            if time.monotonic() > deadline:
                return  # the note stays for the next attempt
            time.sleep(_RETRY_S)
    note.unlink(missing_ok=True)


def _is_ours(folder: Path) -> bool:
    """Whether it is a folder of this user's: after a restart of the machine somebody else may have the name."""
    try:
        found = folder.lstat()
    except FileNotFoundError:
        return False
    return folder.name.startswith("sa-") and stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
