"""A folder for the Ray of one session of tests, so that the user's own Ray finds nothing of it, also when it is killed.

Ray notes the address of the cluster that was started last in its folder, and `serve run` goes there.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

PLACE = Path("/tmp")
"""Short: sockets lie in the folder, and their paths have 108 bytes (macOS: 104)."""
_PREFIX = "serve-app-tests-"


@contextmanager
def private_ray_folder(place: Path = PLACE) -> Iterator[Path]:
    """Ray's folder while the block runs, in this process and its children. Takes away what killed sessions left."""
    for left in place.glob(f"{_PREFIX}*"):
        owner = re.fullmatch(r"\d+", left.name.removeprefix(_PREFIX))
        if owner and (int(owner[0]) == os.getpid() or not psutil.pid_exists(int(owner[0]))):
            shutil.rmtree(left, ignore_errors=True)  # what is another user's stays
    folder = place / f"{_PREFIX}{os.getpid()}"
    folder.mkdir(mode=0o700)
    before = os.environ.get("RAY_TMPDIR")
    os.environ["RAY_TMPDIR"] = str(folder)
    try:
        yield folder
    finally:
        if before is None:
            del os.environ["RAY_TMPDIR"]
        else:
            os.environ["RAY_TMPDIR"] = before
        shutil.rmtree(folder, ignore_errors=True)
