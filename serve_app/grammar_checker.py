"""Asks whether a grammar can be used before anything is generated, without harm to the process that asks.

A grammar is text of a caller, and some grammars end the process that compiles them: see `grammar_sandbox`, which this
module starts with the first grammar. Promises that the event loop never waits, and that a grammar is tried once. Knows
no request.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
import sys
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from serve_app.core import FailureCode, RequestError
from serve_app.grammar import MAX_GRAMMAR_BYTES
from serve_app.grammar_sandbox import read_message, write_message

START_LIMIT_S = 120.0
"""Time for a sandbox to load the vocabulary: a second for the demo, 4 s for 262,145 tokens."""
WALL_LIMIT_S = 30.0
"""Time for one grammar on a machine that is busy. The sandbox limits its CPU time."""
MAX_WAITING = 32
"""Grammars that wait for their turn; one more gets 503."""
MAX_VERDICTS = 4096
"""Grammars whose verdict is remembered: about 200 bytes each."""


class GrammarChecker:
    """One per ingress replica, used from its event loop."""

    def __init__(self, folder: Path, *, trust_remote_code: bool = False) -> None:
        """`folder`: where the model's tokenizer is."""
        self._command = (sys.executable, "-m", "serve_app.grammar_sandbox", str(folder), str(int(trust_remote_code)))
        self._sandbox: subprocess.Popen[bytes] | None = None
        self._one_at_a_time = ThreadPoolExecutor(1, "grammar checker")
        self._verdicts: OrderedDict[bytes, str] = OrderedDict()
        self._running: dict[bytes, asyncio.Task[str]] = {}

    async def fault(self, grammar: str) -> str:
        """What is wrong with a grammar, without a full stop; "" when it can be used.

        Costs nothing for one that was asked about before. Raises `RequestError` when it can't be tried now.
        """
        text = grammar.encode(errors="surrogatepass")
        if len(text) > MAX_GRAMMAR_BYTES:
            return f"it is longer than {MAX_GRAMMAR_BYTES} bytes"
        key = hashlib.sha256(text).digest()
        if (known := self._verdicts.get(key)) is not None:
            self._verdicts.move_to_end(key)
            return known
        if (task := self._running.get(key)) is None:
            if len(self._running) >= MAX_WAITING:
                message = "Too many new schemas and grammars wait to be checked; try again in a moment."
                raise RequestError(message, code=FailureCode.OVERLOADED)
            task = self._running[key] = asyncio.create_task(self._tried(key, grammar), name="grammar check")
        return await asyncio.shield(task)  # a client that leaves must not take the verdict from the others

    async def aclose(self) -> None:
        """End the sandbox."""
        if self._sandbox is not None:
            await asyncio.to_thread(_end, self._sandbox)
        self._one_at_a_time.shutdown(wait=False, cancel_futures=True)

    async def _tried(self, key: bytes, grammar: str) -> str:
        try:
            loop = asyncio.get_running_loop()
            verdict = await loop.run_in_executor(self._one_at_a_time, self._try, grammar)
        finally:
            del self._running[key]
        self._verdicts[key] = verdict
        if len(self._verdicts) > MAX_VERDICTS:
            self._verdicts.popitem(last=False)
        return verdict

    def _try(self, grammar: str) -> str:
        sandbox = self._sandbox
        if sandbox is None or sandbox.poll() is not None:
            sandbox = self._sandbox = self._started()
        verdict = None
        timer = threading.Timer(WALL_LIMIT_S, sandbox.kill)
        timer.start()
        try:
            assert sandbox.stdin is not None
            assert sandbox.stdout is not None
            write_message(sandbox.stdin, grammar)  # type: ignore[arg-type]
            verdict = read_message(sandbox.stdout)  # type: ignore[arg-type]
        except OSError:
            pass
        finally:
            timer.cancel()
        if verdict is None:
            _end(sandbox)
            raise _unavailable("the process that tries it has ended")
        return verdict

    def _started(self) -> subprocess.Popen[bytes]:
        """A new sandbox, once it has loaded the vocabulary. Raises `RequestError`."""
        # It must find the same modules, also those on search paths that were only added to `sys.path`.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        sandbox = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        timer = threading.Timer(START_LIMIT_S, sandbox.kill)
        timer.start()
        assert sandbox.stdout is not None
        trouble = read_message(sandbox.stdout)  # type: ignore[arg-type]
        timer.cancel()
        if trouble is None:
            _end(sandbox)
            raise _unavailable("the process that tries it does not start")
        if trouble:
            raise RequestError(f"Structured output can't be served: {trouble}.", code="unsupported_parameter")
        return sandbox


def _end(sandbox: subprocess.Popen[bytes]) -> None:
    sandbox.kill()
    sandbox.wait()


def _unavailable(reason: str) -> RequestError:
    return RequestError(f"The schema or grammar can't be checked now: {reason}.", code=FailureCode.OVERLOADED)
