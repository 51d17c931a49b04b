"""Which ids may come next under a grammar: a function of the grammar and of the output's ids.

A `Constraint` caches where a sequence's grammar stands: it is made by replaying the output's ids and follows each new
one. Matchers of one grammar share the states of its lexer, and with them a limit. So no error of a matcher counts that
one of its own, compiled anew and given the same ids, does not have: nothing depends on what other sequences did. Knows
no tokenizer and no text: the bytes of the tokens come with the compiled grammar.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher

from serve_app.core import GenerationRequest
from serve_app.grammar import NO_EXTENSION, Vocabulary, matcher_error

logger = logging.getLogger(__name__)

Words = npt.NDArray[np.uint32]
BuiltMasks = tuple[Words, list[int], set[int]]
"""Masks `[n, words]`, the first row of each place, and the places (by number) whose grammar had an error."""
REPLAYED_AT_ONCE = 64
"""Ids that a replay gives to a matcher in one call, which keeps Python's global lock: 0.1 ms."""


@dataclass(frozen=True, slots=True)
class PendingMask:
    """The masks of one place, among those that one thread computes."""

    future: Future[BuiltMasks]
    number: int
    final: bool
    """Whether an error counts: the matcher shares nothing."""
    drafted: bool = False
    """Whether masks after the ids of a draft are among them."""

    @property
    def done(self) -> bool:
        return self.future.done()

    def error(self) -> BaseException | None:
        return self.future.exception()

    def has_error(self) -> bool:
        return self.error() is not None or self.number in self.future.result()[2]

    def words(self, rows: int) -> Words:
        """The first `rows` masks."""
        words, firsts, _ = self.future.result()
        return words[firsts[self.number] :][:rows]


class Constraint:
    """The grammar of one sequence, after the output so far.

    The ids that end the output are allowed exactly where the grammar accepts and `min_tokens` are there, whatever the
    grammar says of them.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        matcher: LLMatcher,
        request: GenerationRequest,
        anew: Callable[[], LLMatcher] | None = None,
    ) -> None:
        """Before the first id of the output.

        Args:
            matcher: at the beginning; no other sequence uses it.
            anew: compiles the grammar again, so that nothing is shared. Without it an error of `matcher` is final.
        """
        self.vocabulary = vocabulary
        self.matcher = matcher
        self.pending: PendingMask | None = None
        """The mask after the output, while it is computed or waits to be used. Until it is there, nothing else here may
        be used."""
        self.watched = 0
        """For how many more steps its masks are computed apart from those of others, because one came late."""
        self._anew = anew
        self._broken: str | None = None
        self._min_tokens = request.sampling.min_tokens
        self._ids: list[int] = []
        bits: dict[int, int] = {}
        for token_id in request.stop_token_ids:
            bits[token_id // 32] = bits.get(token_id // 32, 0) | 1 << token_id % 32
        self._stop_bits = [(word, np.uint32(these), ~np.uint32(these)) for word, these in bits.items()]

    def advance(self, token_ids: SequenceOf[int]) -> None:
        """Add the next ids of the output, none of which ends it. An id that no mask allowed makes it `failed`."""
        self._ids.extend(token_ids)
        try:
            self.matcher.consume_tokens(list(token_ids))
        except BaseException as error:  # noqa: BLE001 - a panic of Rust code is no Exception
            self.fail(error)

    @property
    def held(self) -> bool:
        """Whether its sequence can't be in a step, since its mask is still computed."""
        return self.pending is not None and not self.pending.done

    @property
    def has_error(self) -> bool:
        return self._broken is not None or self.matcher.is_error()

    @property
    def complete(self) -> bool:
        """Whether the output ends here, because the grammar accepts it and nothing can follow."""
        return self.matcher.is_stopped() and not self.has_error

    @property
    def failed(self) -> str | None:
        """Why no id can come next, though the grammar does not accept the output; None if it does."""
        if self._broken is not None:
            reason = self._broken
        elif self.matcher.is_error():
            reason = matcher_error(self.matcher)
        elif self.matcher.is_accepting():
            return None
        else:
            reason = NO_EXTENSION
        return f"the output can't go on within the grammar: {reason}"

    @property
    def can_recover(self) -> bool:
        return self._anew is not None

    @property
    def may_recover(self) -> bool:
        """Whether it has an error that may come from what other sequences did."""
        if self._broken is not None:
            return self.can_recover
        return self.can_recover and self.matcher.is_error() and matcher_error(self.matcher) != NO_EXTENSION

    def recover(self) -> None:
        """Go on with a matcher that shares nothing, and has no error unless the output so far is its cause.

        Takes the time of a compilation or two, and mostly of one mask. Raises `GrammarError`.
        """
        assert self._anew is not None
        # Each mask makes states of the lexer, of which there is a limit, and renews its fuel, which an output may use
        # up. So where the ids alone end in an error, they may not with the masks between them, and the other way round.
        for masked in (False, True):
            self.matcher, self._broken = self._anew(), None
            for token_id in self._ids:
                if masked:
                    self.matcher.compute_bitmask()
                self.matcher.consume_token(token_id)
            if self.complete:
                return
            self.matcher.compute_bitmask()
            if not self.matcher.is_error():
                return

    def fail(self, error: BaseException) -> None:
        """Let nothing come next, since the grammar can't be asked any more."""
        logger.error("a grammar failed", exc_info=error)
        self._broken = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"

    def forced(self) -> list[int]:
        """The next ids as far as the grammar leaves no choice. The masks decide: these are good guesses."""
        return [] if self.has_error else self.matcher.compute_ff_tokens()

    def allowed(self, token_ids: SequenceOf[int]) -> int:
        """How many of these guessed next ids the grammar allows, up to the first that it does not."""
        if self.has_error:
            return 0
        accept = self.vocabulary.accept_id  # it is no token, whatever id a prompt holds
        known = next((place for place, token_id in enumerate(token_ids) if token_id == accept), None)
        return self.matcher.validate_tokens(list(token_ids[:known]))

    def end_rows(self, words: Words, accepting: npt.NDArray[np.bool_]) -> None:
        """Allow or forbid the ids that end the output.

        Args:
            words: masks `[n, words]` of the next position and of the n - 1 after it.
            accepting: whether the grammar accepts the output before each, `[n]`.
        """
        for place, accepts in enumerate(accepting):
            if accepts and len(self._ids) + place >= self._min_tokens:
                for word, these, _ in self._stop_bits:
                    words[place, word] |= these
            else:
                for word, _, others in self._stop_bits:
                    words[place, word] &= others
