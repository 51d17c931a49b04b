"""Which services `serve-app serve` has started on this machine: one small file per port, in the user's state folder.

A file counts only while its lock is held, by the process that it names or by the one that watches it. So `stop` ignores
what a crash has left, and never signals a process id that another process has been given since.

The locks are flock's, not filelock's: a child process must go on holding its parent's lock after the parent has died,
and others must read the locked file under a shared lock. filelock offers neither.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from serve_app.cli.command_error import CommandError
from serve_app.cli.private_folder import remove_noted
from serve_app.home import user_folder

_PATIENCE_S = 0.2
"""How long a claim waits for readers, which hold a shared lock for a moment."""
_RETRY_S = 0.01
_NOTE = ".folder"
_LAUNCHER = ".haproxy"


def state_directory() -> Path:
    """$SERVE_APP_STATE, else $XDG_STATE_HOME/serve_app, else ~/.local/state/serve_app."""
    try:
        return user_folder(os.environ.get("SERVE_APP_STATE"), "XDG_STATE_HOME", ".local/state")
    except OSError as error:
        raise CommandError(
            f"the list of running services can't be kept ({error}); set SERVE_APP_STATE to a folder that you can write"
        ) from error


@dataclass(frozen=True, slots=True)
class RunningServer:
    """One service on this machine."""

    port: int
    pid: int
    """The process of `serve run`; SIGINT makes it shut down Serve and its own Ray."""
    config: str


class Claim:
    """This process's exclusive lock on one port's file."""

    def __init__(self, port: int, path: Path, file: TextIO) -> None:
        self._port = port
        self._file = file
        self.note = path.with_suffix(_NOTE)
        """The file that holds the path of the service's private folder."""
        self.launcher = path.with_suffix(_LAUNCHER)
        """The script that starts the service's HAProxy. It is not in /tmp, which may not allow programs to run."""
        self.descriptor = file.fileno()
        """To hand to the child, so that the lock outlives this process if the child does."""

    def record(self, pid: int, config: Path) -> None:
        """Write down which process serves."""
        self._file.seek(0)
        self._file.truncate()
        json.dump(asdict(RunningServer(self._port, pid, str(config))), self._file)
        self._file.flush()


@contextmanager
def claim(port: int) -> Iterator[Claim]:
    """Hold the file of `port`. Raises CommandError when another service has it, or when it can't be written."""
    folder = state_directory() / "servers"
    path = folder / f"{port}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise CommandError(
            f"{path} can't be written ({error.strerror}); set SERVE_APP_STATE to a folder that you can write"
        ) from error
    with file:
        if not _hold(file):
            raise CommandError(
                f"serve-app already serves on port {port}; stop it with `serve-app stop --port {port}`, "
                "or choose another port with --port"
            )
        file.truncate(0)  # what a crash left names a process that has ended
        try:
            yield Claim(port, path, file)
        finally:
            file.truncate(0)


def running_servers() -> list[RunningServer]:
    """The services of this user that are alive, by port."""
    found = []
    for path in (state_directory() / "servers").glob("*.json"):
        try:
            file = path.open(encoding="utf-8")
        except (PermissionError, FileNotFoundError):  # another user's, in a folder that several share
            continue
        with file:
            if _lock(file, fcntl.LOCK_SH):  # nobody holds it: its process has ended
                continue
            text = file.read()
        if text:  # empty: claimed, and not started yet
            found.append(RunningServer(**json.loads(text)))
    return sorted(found, key=lambda server: server.port)


def remove_what_crashes_left() -> None:
    """Remove the private folders and launchers that this user's crashed services have left."""
    for note in (state_directory() / "servers").glob(f"*{_NOTE}"):
        try:
            file = note.with_suffix(".json").open("a+", encoding="utf-8")
        except PermissionError:  # another user's, in a folder that several share
            continue
        with file:
            if _lock(file, fcntl.LOCK_SH):  # nobody holds it, and nobody can claim it while we look
                remove_noted(note)
                note.with_suffix(_LAUNCHER).unlink(missing_ok=True)


def _hold(file: TextIO) -> bool:
    end = time.monotonic() + _PATIENCE_S
    while not _lock(file, fcntl.LOCK_EX):
        if time.monotonic() > end:
            return False
        time.sleep(_RETRY_S)
    return True


def _lock(file: TextIO, kind: int) -> bool:
    """Whether the lock was free: exclusive for a claim, shared for readers, which don't block each other."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
