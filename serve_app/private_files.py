"""Folders and files that only this user can have written: what is loaded as code must come from nowhere else."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def make_private_folder(folder: Path) -> None:
    """Make the folder with mode 0700; an existing one loses the rights of other users.

    Raises OSError when the folder can't be made or belongs to another user.
    """
    try:
        found = folder.lstat()
    except FileNotFoundError:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)  # two replicas may start at once
        found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, "it is no folder", str(folder))
    if found.st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, "it belongs to another user", str(folder))
    if found.st_mode & _OTHERS:
        folder.chmod(0o700)


def open_own_file(path: Path) -> int:
    """A read-only descriptor of a regular file that belongs to this user and that no other user may write.

    Raises OSError for any other file. The descriptor stays with the checked file, even if the path is replaced.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    found = os.fstat(descriptor)
    if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & _OTHERS_WRITE:
        return descriptor
    os.close(descriptor)
    raise PermissionError(errno.EPERM, "another user could have written it", str(path))
