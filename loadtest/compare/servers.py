"""A server of a contender: started in a session of its own, waited for, and stopped with everything it started.

Promises to end every process that descends from the one it started, and no other.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from loadtest.compare.accounting import ProcessTree
from loadtest.interrupts import heed_ctrl_c

STOP_PATIENCE_S = 20.0
"""Nothing is in progress when a server is asked to stop. `transformers serve` does not stop when it is asked with
SIGINT, at once or in 45 s."""
_POLL_S = 0.25


class ServerFailed(Exception):
    """A server that ended before it was ready, or took too long; the message has its last words."""


@dataclass(frozen=True, slots=True)
class Command:
    """How a server is started."""

    arguments: list[str]
    environment: Mapping[str, str]
    ready_path: str
    """Answers 200 when requests can be sent."""
    ready_timeout_s: float
    folder: Path | None = None
    """Where it is started; None: here."""


class Server:
    """A running server. A context manager: entering returns when it is ready, leaving stops it."""

    def __init__(self, command: Command, url: str, log: Path) -> None:
        self.url = url
        self._command = command
        self._log = log
        self._process: psutil.Popen | None = None
        self.tree: ProcessTree

    def __enter__(self) -> Server:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("w") as output:
            self._process = psutil.Popen(
                self._command.arguments,
                env=dict(self._command.environment),
                cwd=self._command.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C reaches this program only, which stops the server in order
                preexec_fn=heed_ctrl_c,
            )
        self.tree = ProcessTree(self._process)
        try:
            self._until_ready(self._process)
        except BaseException:
            self._stop(self._process)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._stop(self._process)

    def _until_ready(self, process: psutil.Popen) -> None:
        end = time.monotonic() + self._command.ready_timeout_s
        with httpx.Client(trust_env=False, timeout=5) as client:
            while time.monotonic() < end:
                if process.poll() is not None:
                    raise ServerFailed(
                        f"ended with status {process.returncode} before it was ready: {self.last_words()}"
                    )
                with contextlib.suppress(httpx.TransportError):  # it does not listen yet
                    if client.get(self.url + self._command.ready_path).status_code == 200:
                        return
                time.sleep(_POLL_S)
        raise ServerFailed(f"not ready after {self._command.ready_timeout_s:.0f} s: {self.last_words()}")

    def last_words(self) -> str:
        """The last lines of its output."""
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return f"{' | '.join(lines[-3:])[-500:]} (see {self._log})"

    def _stop(self, process: psutil.Popen) -> None:
        """Ask it twice, then SIGKILL; a second Ctrl-C meanwhile must not leave half of it behind."""
        impatience = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self.tree.members()  # known from now on, also when their parents go
            for number, patience_s in ((signal.SIGINT, STOP_PATIENCE_S), (signal.SIGTERM, 10.0)):
                if process.poll() is None:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.send_signal(number)
                    with contextlib.suppress(psutil.TimeoutExpired):
                        process.wait(patience_s)
            self.tree.kill()
        finally:
            for number, handler in impatience.items():
                signal.signal(number, handler)
