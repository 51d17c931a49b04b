"""Serves in the place of a HAProxy that was killed, until Serve has started another one that knows the application.

`haproxy_standin.py OWNER PID FOLDER PROGRAM ARGUMENTS...`, started by the launcher beside each HAProxy. Serve needs
three failed checks and a new actor to replace a HAProxy, 4 to 7 s in which nobody listens, and then some seconds in
which the new one knows no application. The stand-in listens at once, with the same configuration but for the admin
socket: to Serve the HAProxy is still gone, so that it replaces it as ever. All share the ports (SO_REUSEPORT). The
launcher keeps a HAProxy that knows no application off the ports while there is a stand-in; the first one that knows it
tells the stand-in to take no more connections, as in a reload. Those that it has are served to their end.

Needs the standard library only: it runs without the environment's packages, which takes 20 ms and 9 MB.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

ENDED = "ended"
"""A file of this name in the folder says that the service is being stopped: its proxy is not to be missed."""
PID = "standin"
"""The file in the folder that holds the stand-in's process id, locked as long as there is one."""
CONFIG = "standin.cfg"
"""The stand-in's configuration in the folder; its name in the command line tells the stand-in."""
LOOK_MS = 200
"""Between two looks at whether the service is being stopped, while a stand-in serves."""
STARTS = 20
"""How often a stand-in that dies, too, is started again."""
_ADMIN = re.compile(r"^\s*stats socket (\S+).*\n", re.MULTILINE)
_PR_SET_PDEATHSIG = 1


def main(words: Sequence[str]) -> None:
    """Wait for the death of HAProxy `PID` or of the process `OWNER`, and do what is to be done then."""
    owner, pid, place, program, *arguments = words
    folder = Path(place)
    os.setsid()  # Ray ends the process group of the actor that started HAProxy together with the actor
    try:
        text = Path(arguments[arguments.index("-f") + 1]).read_text()  # now: its successor's is another one
    except FileNotFoundError:  # the service has ended
        return
    watched: list[int] = []
    with contextlib.suppress(ProcessLookupError):  # it has died already
        watched.append(os.pidfd_open(int(owner)))
        watched.append(os.pidfd_open(int(pid)))
        _ended(watched, None)
    if not watched or watched[0] in _ended(watched[:1], 0):
        return
    if (admin := _ADMIN.search(text)) is None or _may_rest(admin[1], folder):
        return
    with (folder / PID).open("a") as note:
        try:
            fcntl.flock(note, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return  # the watcher of another HAProxy of this service was faster
        (folder / CONFIG).write_text(_ADMIN.sub("", text))
        _stand_in([program, "-db", "-f", str(folder / CONFIG)], watched[0], note, admin[1], folder)


def _stand_in(command: list[str], owner: int, note: TextIO, admin: str, folder: Path) -> None:
    """Run `command` until a successor has told it to end, or `owner` (a pidfd) or the service ends."""
    for _ in range(STARTS):
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_die_with_parent)
        note.truncate(0)
        note.write(str(process.pid))
        note.flush()
        pidfd = os.pidfd_open(process.pid)
        try:
            while not (gone := _ended([owner, pidfd], LOOK_MS)) and not (folder / ENDED).exists():
                pass
            if pidfd not in gone:
                return
        finally:
            process.kill()
            status = process.wait()
            os.close(pidfd)
            note.truncate(0)
        if status == 0 or _may_rest(admin, folder) or _ended([owner], LOOK_MS):
            return  # it ended by itself: it was told to


def _may_rest(admin: str, folder: Path) -> bool:
    """Whether nobody misses a HAProxy: another one has taken over, or the service is being stopped."""
    return (folder / ENDED).exists() or not folder.exists() or _answers(admin)


def _ended(pidfds: Sequence[int], timeout_ms: int | None) -> set[int]:
    """Those whose processes have ended, after waiting for one."""
    poll = select.poll()
    for pidfd in pidfds:
        poll.register(pidfd, select.POLLIN)
    return {pidfd for pidfd, _ in poll.poll(timeout_ms)}


def _answers(admin: str) -> bool:
    """Whether a HAProxy listens on this socket."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(1.0)
        connection.connect(admin)
        connection.sendall(b"show info\n")
        return bool(connection.recv(16))
    return False


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
