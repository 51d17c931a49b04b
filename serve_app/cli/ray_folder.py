"""The folder in which a Ray of our own keeps its sessions. Only this user may enter it.

Ray lets every user write into the folders of its sessions, also those of its sockets. On a machine with several users,
one of them could impersonate another's Ray.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from serve_app.cli.command_error import CommandError
from serve_app.private_files import make_private_folder

PLACE = "RAY_TMPDIR"
_SYSTEMS = Path("/tmp")
_LONGEST_WITHIN = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/dash_MetricsHead"
_SOCKET_BYTES = 107
"""Longest path of a Unix socket on Linux. macOS allows 103 bytes; there the folder is in /tmp and its path is short."""
MAX_BYTES = _SOCKET_BYTES - len(_LONGEST_WITHIN)


def ray_folder(environment: Mapping[str, str], systems: Path = _SYSTEMS) -> dict[str, str]:
    """$RAY_TMPDIR, unless `environment` has it: a private folder in $TMPDIR (on Linux, as Ray does) or in `systems`.

    Raises CommandError when the user's own choice can't be used, or no place can.
    """
    if own := environment.get(PLACE):
        if complaint := _complaint(Path(own)):
            raise CommandError(f"{PLACE} {own} {complaint}; set it to another folder, or unset it")
        return {}
    temporary = environment.get("TMPDIR") if sys.platform == "linux" else None
    complaints = []
    for place in [*([Path(temporary)] if temporary else []), systems]:
        private = place / f"serve_app-{os.geteuid()}"
        try:
            if place.is_dir():
                make_private_folder(private)
            complaint = _complaint(private)
        except OSError as error:
            complaint = f"can't be used: {error.strerror}"
        if complaint is None:
            return {PLACE: str(private)}
        complaints.append(f"{private} {complaint}")
    raise CommandError(f"Ray can't keep its files: {'; '.join(complaints)}; set {PLACE} to a folder that you can write")


def _complaint(place: Path) -> str | None:
    """Why Ray can't keep its files there, to be read after the place's name."""
    if len(os.fsencode(place)) > MAX_BYTES:
        return f"has a path of more than {MAX_BYTES} bytes, too long for the sockets that Ray makes in it"
    if not os.access(place, os.W_OK | os.X_OK):
        return "can't be written by this user"
    return None
