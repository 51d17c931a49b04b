"""A service of its own for a measurement: started by a command, its processes and logs found, stopped whatever happens.

Promises to touch only processes that descend from the one it started. Ray's files live in a folder of the run's own.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx
import psutil

from loadtest.interrupts import heed_ctrl_c

_STOP_TIMEOUT_S = 60.0
_POLL_S = 0.02


class LocalService:
    """A command that serves on `port` of 127.0.0.1 until it is interrupted. A context manager."""

    def __init__(self, command: Sequence[str], port: int, log: Path, environment: Mapping[str, str]) -> None:
        """What it prints goes to `log`; `environment` is added to this process's own."""
        self.url = f"http://127.0.0.1:{port}"
        self._command = command
        self._log = log
        self._folder = Path(tempfile.mkdtemp(prefix="serve-app-"))
        self._environment = {
            **os.environ,
            "RAY_ADDRESS": "local",
            "RAY_TMPDIR": str(self._folder),
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "SERVE_APP_STATE": str(self._folder),
            **environment,
        }
        self.process: psutil.Popen | None = None
        self.started_at = 0.0
        """`time.time()` of its start."""

    def __enter__(self) -> LocalService:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # through __exit__, as Ctrl-C does
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("w") as output:
            self.started_at = time.time()
            # A session of its own keeps the terminal's Ctrl-C to this process, which stops the service in order.
            self.process = psutil.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
                preexec_fn=heed_ctrl_c,
            )
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._stop()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def session(self) -> Path | None:
        """Ray's folder of this run, once there is one."""
        return next((self._folder / "ray").glob("session_2*"), None)

    def family(self) -> list[psutil.Process]:
        """All of its processes."""
        return [] if self.process is None else [self.process, *self.process.children(recursive=True)]

    def until_answers(self, path: str, timeout_s: float = 300.0) -> float:
        """Ask for `path` until it is answered with 200; `time.time()` of that. Raises `RuntimeError`."""
        end = time.time() + timeout_s
        with httpx.Client(timeout=5, trust_env=False) as client:
            while time.time() < end:
                if self.process is None or self.process.poll() is not None:
                    raise RuntimeError(f"the service ended before it answered; see {self._log}")
                with contextlib.suppress(httpx.HTTPError):  # it does not listen yet
                    if client.get(self.url + path).status_code == 200:
                        return time.time()
                time.sleep(_POLL_S)
        raise RuntimeError(f"the service did not answer within {timeout_s:g} s; see {self._log}")

    def _stop(self) -> None:
        """SIGINT, then SIGTERM, then SIGKILL for whatever is left of its processes."""
        if self.process is None:
            return
        family = self.family() if self.process.is_running() else []
        for number, patience_s in ((signal.SIGINT, _STOP_TIMEOUT_S), (signal.SIGTERM, 10.0)):
            if self.process.poll() is None:
                self.process.send_signal(number)
                with contextlib.suppress(psutil.TimeoutExpired):
                    self.process.wait(patience_s)
        _, left = psutil.wait_procs(family, timeout=5)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
