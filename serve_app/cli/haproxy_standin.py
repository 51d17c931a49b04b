"""Serves in the place of a HAProxy that was killed, until Serve has started another one.

`haproxy_standin.py OWNER PID FOLDER PROGRAM ARGUMENTS...`, started by the launcher beside each HAProxy. Serve needs
three failed checks and a new actor to replace a HAProxy: 4 to 7 s in which nobody listens. The stand-in listens at
once, with the same configuration but for the admin socket: to Serve the HAProxy is still gone, so that it replaces it
as ever. The launcher starts the successor so that it takes the listening sockets from the stand-in, as in a reload:
no connection is refused, and those of the stand-in are served to their end.

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
SOCKET = "n.sock"
"""The stand-in's admin socket in the folder, from which a successor takes the listening sockets."""
PID = "standin"
"""The file in the folder that holds the stand-in's process id, locked as long as there is one."""
LOOK_MS = 200
"""Between two looks at whether the service is being stopped, while a stand-in serves."""
STARTS = 20
"""How often a stand-in that dies, too, is started again."""
_ADMIN = re.compile(r"^\s*stats socket (\S+).*$", re.MULTILINE)
_PR_SET_PDEATHSIG = 1


def main(words: Sequence[str]) -> None:
    """Wait for the death of HAProxy `PID` or of the process `OWNER`, and do what is to be done then."""
    owner, pid, folder, program, *arguments = words
    watched: list[int] = []
    with contextlib.suppress(ProcessLookupError):  # it has died already
        watched.append(os.pidfd_open(int(owner)))
        watched.append(os.pidfd_open(int(pid)))
        _ended(watched, None)
    if not watched or watched[0] in _ended(watched[:1], 0):
        return
    config = Path(arguments[arguments.index("-f") + 1])
    try:
        text = config.read_text()
    except FileNotFoundError:  # the service has ended
        return
    if (admin := _ADMIN.search(text)) is None or _may_rest(admin[1], Path(folder)):
        return
    with (Path(folder) / PID).open("a") as note:
        try:
            fcntl.flock(note, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return  # the watcher of another HAProxy of this service was faster
        own = config.with_name("standin.cfg")
        socket_line = f"    stats socket {Path(folder) / SOCKET} mode 600 level admin expose-fd listeners"
        own.write_text(_ADMIN.sub(socket_line, text))
        command = [program, *(word for word in ("-db", "-dR") if word in arguments), "-f", str(own)]
        _stand_in(command, watched[0], note, admin[1], Path(folder))


def _stand_in(command: list[str], owner: int, note: TextIO, admin: str, folder: Path) -> None:
    """Run `command` until a successor has taken its place, or `owner` (a pidfd) or the service ends."""
    for _ in range(STARTS):
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_die_with_parent)
        note.truncate(0)
        note.write(str(process.pid))
        note.flush()
        pidfd = os.pidfd_open(process.pid)
        try:
            while not (gone := _ended([owner, pidfd], LOOK_MS)) and not (folder / ENDED).exists():
                if _answers(admin):  # the stand-in has no listening sockets any more, and ends with its connections
                    note.truncate(0)
                    fcntl.flock(note, fcntl.LOCK_UN)
                    _ended([owner, pidfd], None)
                    return
            if pidfd not in gone:
                return
        finally:
            process.kill()
            process.wait()
            os.close(pidfd)
            note.truncate(0)
        if _may_rest(admin, folder):
            return


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
