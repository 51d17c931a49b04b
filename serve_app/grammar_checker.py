"""Asks whether a grammar can be used before anything is generated, without harm to the process that asks.

A grammar is text of a caller, and some grammars end the process that compiles them: see `grammar_sandbox`, which this
module starts with the first grammar. Promises that the event loop never waits, that a grammar is tried once, and that
one caller's slow grammars keep no other caller waiting for long. Knows no request.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
import sys
import threading
from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from serve_app.core import FailureCode, RequestError
from serve_app.grammar import MAX_GRAMMAR_BYTES
from serve_app.grammar_sandbox import (
    CPU_LIMIT_S,
    IS,
    OUT_OF_TIME,
    TOO_SLOW,
    OutOfTime,
    read_message,
    write_message,
)

START_LIMIT_S = 120.0
"""Time for a sandbox to load the vocabulary: a second for the demo, 4 s for 262,145 tokens."""
WALL_LIMIT_S = 30.0
"""Time for one grammar on a machine that is busy. The sandbox limits its CPU time."""
FIRST_LIMIT_S = 0.25
"""CPU time for the first try of a grammar. One that needs more is tried again with `CPU_LIMIT_S`."""
SANDBOXES = 2
"""Grammars that are tried at once, one of them with `CPU_LIMIT_S`. The second process starts when it is needed."""
MAX_WAITING = 32
"""Grammars that wait for their first try; one more gets 503."""
MAX_WAITING_OF_CALLER = 8
MAX_WAITING_AGAIN = 8
"""Grammars that wait for their second try."""
MAX_VERDICTS = 4096
"""Grammars whose verdict is remembered: about 200 bytes each."""


@dataclass(eq=False, slots=True)
class _Check:
    key: bytes
    grammar: str
    verdict: asyncio.Future[str]
    cpu_limit_s: float = FIRST_LIMIT_S


class GrammarChecker:
    """One per ingress replica, used from its event loop."""

    def __init__(self, folder: Path, *, trust_remote_code: bool = False) -> None:
        """`folder`: where the model's tokenizer is."""
        command = (sys.executable, "-m", "serve_app.grammar_sandbox", str(folder), str(int(trust_remote_code)))
        self._sandboxes = [_Sandbox(command) for _ in range(SANDBOXES)]
        self._idle = list(self._sandboxes)
        self._verdicts: OrderedDict[bytes, str] = OrderedDict()
        self._checks: dict[bytes, _Check] = {}
        """Those that wait or run."""
        self._waiting: OrderedDict[str | None, deque[_Check]] = OrderedDict()
        """For their first try, by caller. The callers take turns."""
        self._again: deque[_Check] = deque()
        """For their second try."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._slow = 0

    async def fault(self, grammar: str, caller: str | None = None) -> str:
        """What is wrong with a grammar, without a full stop; "" when it can be used.

        Costs nothing for one that was asked about before. `caller`: who asks; None if that is not known. Raises
        `RequestError` when it can't be tried now.
        """
        text = grammar.encode(errors="surrogatepass")
        if len(text) > MAX_GRAMMAR_BYTES:
            return f"it is longer than {MAX_GRAMMAR_BYTES} bytes"
        key = hashlib.sha256(text).digest()
        if (known := self._verdicts.get(key)) is not None:
            self._verdicts.move_to_end(key)
            return known
        if (check := self._checks.get(key)) is None:
            self._refuse_when_full(caller)
            check = self._checks[key] = _Check(key, grammar, asyncio.get_running_loop().create_future())
            # All who asked may have left when it fails.
            check.verdict.add_done_callback(lambda verdict: verdict.cancelled() or verdict.exception())
            self._waiting.setdefault(caller, deque()).append(check)
            self._begin()
        return await asyncio.shield(check.verdict)  # a client that leaves must not take the verdict from the others

    async def aclose(self) -> None:
        """End the sandboxes."""
        for sandbox in self._sandboxes:
            await asyncio.to_thread(sandbox.close)

    def _refuse_when_full(self, caller: str | None) -> None:
        of_caller = 0 if caller is None else len(self._waiting.get(caller, ()))
        if of_caller >= MAX_WAITING_OF_CALLER or sum(map(len, self._waiting.values())) >= MAX_WAITING:
            message = "Too many new schemas and grammars wait to be checked; try again in a moment."
            raise RequestError(message, code=FailureCode.OVERLOADED)

    def _begin(self) -> None:
        """Give what waits to the sandboxes that are idle."""
        while self._idle and (check := self._next()) is not None:
            # One that has started already comes first.
            sandbox = next((one for one in self._idle if one.started), self._idle[0])
            self._idle.remove(sandbox)
            task = asyncio.create_task(self._run(sandbox, check), name="grammar check")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _next(self) -> _Check | None:
        if self._again and not self._slow:
            self._slow += 1
            return self._again.popleft()
        if not self._waiting:
            return None
        caller, checks = self._waiting.popitem(last=False)
        check = checks.popleft()
        if checks:
            self._waiting[caller] = checks  # behind the others
        return check

    async def _run(self, sandbox: _Sandbox, check: _Check) -> None:
        try:
            self._tell(check, await sandbox.run(check))
        except OutOfTime:
            if check.cpu_limit_s >= CPU_LIMIT_S:
                self._tell(check, TOO_SLOW)
            elif len(self._again) < MAX_WAITING_AGAIN:
                self._again.append(_Check(check.key, check.grammar, check.verdict, CPU_LIMIT_S))
            else:
                self._fail(check, _unavailable("too many others take as long"))
        except Exception as error:  # noqa: BLE001 - who asked raises it
            self._fail(check, error)
        finally:
            self._slow -= check.cpu_limit_s >= CPU_LIMIT_S
            self._idle.append(sandbox)
            self._begin()

    def _tell(self, check: _Check, verdict: str) -> None:
        del self._checks[check.key]
        check.verdict.set_result(verdict)
        self._verdicts[check.key] = verdict
        if len(self._verdicts) > MAX_VERDICTS:
            self._verdicts.popitem(last=False)

    def _fail(self, check: _Check, error: Exception) -> None:
        del self._checks[check.key]
        check.verdict.set_exception(error)


class _Sandbox:
    """A process that tries one grammar at a time, and the thread that talks to it. The process starts when needed."""

    def __init__(self, command: tuple[str, ...]) -> None:
        self._command = command
        self._thread = ThreadPoolExecutor(1, "grammar checker")
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def started(self) -> bool:
        return self.process is not None

    async def run(self, check: _Check) -> str:
        """The verdict on a grammar. Raises `OutOfTime`, and `RequestError` where there is none."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._try, check)

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            _end(self.process)
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _try(self, check: _Check) -> str:
        process = self.process
        if process is None or process.poll() is not None:
            process = self.process = self._start()
        reply = None
        timer = threading.Timer(WALL_LIMIT_S, process.kill)
        timer.start()
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            write_message(process.stdin, f"{check.cpu_limit_s}\n{check.grammar}")  # type: ignore[arg-type]
            reply = read_message(process.stdout)  # type: ignore[arg-type]
        except OSError:
            pass
        finally:
            timer.cancel()
        if reply is None:
            _end(process)
            raise _unavailable("the process that tries it has ended")
        if reply == OUT_OF_TIME:
            raise OutOfTime
        if reply[:1] != IS:
            raise _unavailable(reply[1:])
        return reply[1:]

    def _start(self) -> subprocess.Popen[bytes]:
        """A new process, once it has loaded the vocabulary. Raises `RequestError`."""
        # It must find the same modules, also those on search paths that were only added to `sys.path`.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        try:
            process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        except OSError as error:  # no memory, no processes
            raise _unavailable("the process that tries it can't be started") from error
        timer = threading.Timer(START_LIMIT_S, process.kill)
        timer.start()
        assert process.stdout is not None
        trouble = read_message(process.stdout)  # type: ignore[arg-type]
        timer.cancel()
        if trouble is None:
            _end(process)
            raise _unavailable("the process that tries it does not start")
        if trouble:
            _end(process)
            raise RequestError(f"Structured output can't be served: {trouble}.", code="unsupported_parameter")
        return process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _unavailable(reason: str) -> RequestError:
    return RequestError(f"The schema or grammar can't be checked now: {reason}.", code=FailureCode.OVERLOADED)
