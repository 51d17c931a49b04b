"""The compiled grammars of an engine: made on threads of their own, kept for the next request with the same one.

Neither an event loop nor the engine's thread waits for a compilation, and llguidance drops Python's global lock while
it compiles, so no other stream does.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor

from llguidance import LLMatcher

from serve_app.core import GenerationRequest
from serve_app.engine.constraint import Constraint
from serve_app.grammar import GrammarError, Vocabulary, VocabularyError, compile_grammar

KEPT_GRAMMARS = 128
KEPT_BYTES = 2**22
"""Of the grammars' texts, together. A schema of 50 kB takes 1 MB when it is compiled."""
_THREADS = 2
"""One hostile grammar, which takes a second at most, does not keep the others waiting."""
_NICENESS = 10
"""Of the threads that compile. On a CPU the model computes on all cores, and a step waits for the slowest of them."""
_REPLAYED_AT_ONCE = 64
"""Ids that a replay gives to a matcher in one call, which keeps Python's global lock: 0.1 ms."""


class Grammars:
    """A vocabulary, which may be loading still, and the grammars that were compiled for it last."""

    def __init__(self, vocabulary: Future[Vocabulary] | None) -> None:
        """`vocabulary`: None where there is none; then each grammar is refused."""
        self._vocabulary = vocabulary
        self._lock = threading.Lock()
        self._compiled: OrderedDict[str, Future[LLMatcher]] = OrderedDict()
        self._bytes = 0
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="grammar", initializer=_yield_to_others)

    async def constraint(self, request: GenerationRequest) -> Constraint:
        """The request's constraint after its `output_token_ids`.

        Raises `GrammarError` or `VocabularyError`, whose message is for the caller.
        """
        # Others may wait for the same compilation: a caller that leaves must not cancel it.
        matcher = await asyncio.shield(asyncio.wrap_future(self._compile(request.constraint)))
        constraint = Constraint(self._loaded(), matcher.deep_copy(), request)
        if request.output_token_ids:
            await asyncio.get_running_loop().run_in_executor(self._pool, _replay, constraint, request)
        return constraint

    def _compile(self, grammar: str) -> Future[LLMatcher]:
        """The compilation of a grammar: under way, done or failed."""
        with self._lock:
            compiled = self._compiled.get(grammar)
            if compiled is not None:
                self._compiled.move_to_end(grammar)
                return compiled
            compiled = self._compiled[grammar] = self._pool.submit(self._begin, grammar)
            self._bytes += len(grammar)
            while len(self._compiled) > 1 and (len(self._compiled) > KEPT_GRAMMARS or self._bytes > KEPT_BYTES):
                oldest, _ = self._compiled.popitem(last=False)
                self._bytes -= len(oldest)
            return compiled

    def _begin(self, grammar: str) -> LLMatcher:
        return compile_grammar(self._loaded(), grammar)

    def _loaded(self) -> Vocabulary:
        """Waits for the vocabulary, which no grammar is compiled without."""
        if self._vocabulary is None:
            raise VocabularyError("this replica has no vocabulary, so that no grammar can be used")
        return self._vocabulary.result()


def _replay(constraint: Constraint, request: GenerationRequest) -> None:
    """Advance a new constraint to the end of the request's output. Raises `GrammarError` when the output breaks it."""
    output = request.output_token_ids
    if output[-1] in request.stop_token_ids:
        output = output[:-1]
    for first in range(0, len(output), _REPLAYED_AT_ONCE):
        constraint.advance(output[first : first + _REPLAYED_AT_ONCE])
    if constraint.matcher.is_error():
        raise GrammarError("the output so far does not match the grammar")


def _yield_to_others() -> None:
    """Lower this thread's priority, where the system has priorities of threads (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
