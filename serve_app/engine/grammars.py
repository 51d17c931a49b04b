"""The compiled grammars of an engine: made on threads of their own, kept for the next request with the same one.

Neither an event loop nor the engine's thread waits for a compilation, and llguidance drops Python's global lock while
it compiles, so no other stream does. Copies of a compiled grammar share its lexer: see `Constraint`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from llguidance import LLMatcher

from serve_app.core import GenerationRequest
from serve_app.engine.constraint import REPLAYED_AT_ONCE, Constraint
from serve_app.grammar import GrammarError, Vocabulary, VocabularyError, compile_grammar, yield_to_others

logger = logging.getLogger(__name__)

KEPT_GRAMMARS = 64
"""Each with the states of its lexer: 7 MB where they reach their limit, and 0.1 MB for ordinary schemas."""
KEPT_BYTES = 2**22
"""Of the grammars' texts, together. A schema of 50 kB takes 1 MB when it is compiled."""
_THREADS = 2
"""One grammar that takes a second does not keep the others waiting."""


class Grammars:
    """A vocabulary, which may be loading still, and the grammars that were compiled for it last."""

    def __init__(self, vocabulary: Future[Vocabulary] | None) -> None:
        """`vocabulary`: None where there is none; then each grammar is refused."""
        self._vocabulary = vocabulary
        self._lock = threading.Lock()
        self._compiled: OrderedDict[str, Future[LLMatcher]] = OrderedDict()
        self._bytes = 0
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="grammar", initializer=yield_to_others)

    async def constraint(self, request: GenerationRequest) -> Constraint:
        """The request's constraint after its `output_token_ids`.

        Raises `GrammarError` or `VocabularyError`, whose message is for the caller.
        """
        # Others may wait for the same compilation: a caller that leaves must not cancel it.
        grammar = request.constraint
        compiled = asyncio.wrap_future(self._compile(grammar))
        compiled.add_done_callback(lambda done: done.cancelled() or done.exception())  # the caller may have left
        base = await asyncio.shield(compiled)
        constraint = Constraint(
            self._loaded(), await self._copy(grammar, base), request, partial(self._anew, grammar, base)
        )
        if request.output_token_ids:
            await asyncio.get_running_loop().run_in_executor(self._pool, _replay, constraint, request)
        return constraint

    async def _copy(self, grammar: str, base: LLMatcher) -> LLMatcher:
        try:
            return base.deep_copy()
        except BaseException:  # a panic of Rust code is no Exception
            logger.exception("a compiled grammar can't be copied")
            return await asyncio.get_running_loop().run_in_executor(self._pool, self._anew, grammar, base)

    def _compile(self, grammar: str) -> Future[LLMatcher]:
        """The compilation of a grammar: under way, done or failed."""
        with self._lock:
            compiled = self._compiled.get(grammar)
            if compiled is not None:
                self._compiled.move_to_end(grammar)
                return compiled
            compiled = self._compiled[grammar] = self._pool.submit(self._begin, grammar)
            self._bytes += _size(grammar)
            while len(self._compiled) > 1 and (len(self._compiled) > KEPT_GRAMMARS or self._bytes > KEPT_BYTES):
                oldest, _ = self._compiled.popitem(last=False)
                self._bytes -= _size(oldest)
            return compiled

    def _begin(self, grammar: str) -> LLMatcher:
        try:
            return compile_grammar(self._loaded(), grammar)
        except (GrammarError, VocabularyError):
            raise
        except BaseException as error:  # a panic of Rust code is no Exception
            logger.exception("a grammar can't be compiled")
            raise GrammarError(f"the grammar can't be used: {type(error).__name__}") from error

    def _anew(self, grammar: str, base: LLMatcher) -> LLMatcher:
        """A matcher that shares nothing, after an error of one that shared the lexer of `base`. Raises `GrammarError`.

        Nobody else begins with that lexer, which may have reached its limit.
        """
        with self._lock:
            kept = self._compiled.get(grammar)
            if kept is not None and kept.done() and kept.exception() is None and kept.result() is base:
                del self._compiled[grammar]
                self._bytes -= _size(grammar)
        return self._begin(grammar)

    def _loaded(self) -> Vocabulary:
        """Waits for the vocabulary, which no grammar is compiled without."""
        if self._vocabulary is None:
            raise VocabularyError("this replica has no vocabulary, so that no grammar can be used")
        return self._vocabulary.result()


def _size(grammar: str) -> int:
    return len(grammar.encode(errors="surrogatepass"))


def _replay(constraint: Constraint, request: GenerationRequest) -> None:
    """Advance a new constraint to the end of the request's output. Raises `GrammarError` when the output breaks it."""
    output = request.output_token_ids
    if output[-1] in request.stop_token_ids:
        output = output[:-1]
    for first in range(0, len(output), REPLAYED_AT_ONCE):
        constraint.advance(output[first : first + REPLAYED_AT_ONCE])
    if constraint.may_recover:
        constraint.recover()
    if constraint.has_error:
        raise GrammarError("the output so far does not match the grammar")
