"""Programs that begin where their imports are already done: what a test starts costs a fork, and no seconds of imports.

All of a session are forked from one process, which imports and does nothing else. A program that a test must start as
a user does (the signals that it inherits, its exit) is started by `subprocess`.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import IO

_FORKS = multiprocessing.get_context("forkserver")


class ForkedProgram:
    """`program(arguments)` in a process of its own, with what `subprocess.Popen` says of one."""

    def __init__(
        self,
        program: Callable[[list[str]], int],
        arguments: list[str],
        environment: Mapping[str, str],
    ) -> None:
        """`program`: a function of a module, which is imported once for all. It returns the exit status."""
        _FORKS.set_forkserver_preload([program.__module__])
        reading, writing = _FORKS.Pipe(duplex=False)
        with reading, writing:
            self._process = _FORKS.Process(
                target=_run, args=(program, arguments, dict(environment), writing), daemon=True
            )
            self._process.start()
            self.stdout: IO[str] = os.fdopen(os.dup(reading.fileno()), encoding="utf-8")
            """What it writes to its standard output and standard error."""
        assert self._process.pid is not None
        self.pid = self._process.pid

    def send_signal(self, number: signal.Signals) -> None:
        """Unless it has ended."""
        if self._process.is_alive():
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self._process.kill()

    def wait(self, timeout_s: float) -> int:
        """Its exit status; minus the number of the signal that ended it. Raises TimeoutError."""
        self._process.join(timeout_s)
        if self._process.exitcode is None:
            raise TimeoutError(f"process {self.pid} still runs after {timeout_s} s")
        return self._process.exitcode


def _run(
    program: Callable[[list[str]], int], arguments: list[str], environment: Mapping[str, str], output: Connection
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for descriptor in (1, 2):
        os.dup2(output.fileno(), descriptor)
    output.close()
    sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False), encoding="utf-8")
    sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", 0, closefd=False), encoding="utf-8", write_through=True)
    sys.exit(program(arguments))
