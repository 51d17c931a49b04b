"""Which ids may come next under a grammar: a function of the grammar and of the output's ids.

A `Constraint` caches where a sequence's grammar stands: it is made by replaying the output's ids and follows each new
one, so nothing depends on it that the ids do not say. Masks are computed on threads of their own while the model
computes. Knows no tokenizer and no text: the bytes of the tokens come with the compiled grammar.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLMatcher

from serve_app.core import GenerationRequest
from serve_app.grammar import NO_EXTENSION, Vocabulary, matcher_error

Words = npt.NDArray[np.uint32]


class Constraint:
    """The grammar of one sequence, after the output so far.

    The ids that end the output are allowed exactly where the grammar accepts and `min_tokens` are there, whatever the
    grammar says of them.
    """

    def __init__(self, vocabulary: Vocabulary, matcher: LLMatcher, request: GenerationRequest) -> None:
        """Before the first id of the output. `matcher`: a copy of its own, at the beginning."""
        self.vocabulary = vocabulary
        self.matcher = matcher
        self._min_tokens = request.sampling.min_tokens
        self._length = 0
        bits: dict[int, int] = {}
        for token_id in request.stop_token_ids:
            bits[token_id // 32] = bits.get(token_id // 32, 0) | 1 << token_id % 32
        self._stop_words = np.array(list(bits), dtype=np.int64)
        self._stop_bits = np.array(list(bits.values()), dtype=np.uint32)

    def advance(self, token_ids: SequenceOf[int]) -> None:
        """Add the next ids of the output, none of which ends it. An id that no mask allowed makes it `failed`."""
        self._length += len(token_ids)
        self.matcher.consume_tokens(list(token_ids))

    @property
    def complete(self) -> bool:
        """Whether the output ends here, because the grammar accepts it and nothing can follow."""
        return self.matcher.is_stopped() and not self.matcher.is_error()

    @property
    def failed(self) -> str | None:
        """Why no id can come next, though the grammar does not accept the output; None if it does."""
        if self.matcher.is_error():
            reason = matcher_error(self.matcher)
        elif self.matcher.is_accepting():
            return None
        else:
            reason = NO_EXTENSION
        return f"the output can't go on within the grammar: {reason}"

    def forced(self) -> list[int]:
        """The next ids as far as the grammar leaves no choice. The masks decide: these are good guesses."""
        return self.matcher.compute_ff_tokens()

    def allowed(self, token_ids: SequenceOf[int]) -> int:
        """How many of these guessed next ids the grammar allows, up to the first that it does not."""
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
            if accepts and self._length + place >= self._min_tokens:
                words[place, self._stop_words] |= self._stop_bits
            else:
                words[place, self._stop_words] &= ~self._stop_bits


@dataclass(frozen=True, slots=True)
class Place:
    """Where a step needs masks: for the row of logits after a sequence's last id, and after each id of its draft."""

    row: int
    """The first of these rows, among the step's rows that are sampled."""
    constraint: Constraint
    draft: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Masks:
    """The ids that may come next, for those rows of a step that have a grammar."""

    rows: list[int]
    """Which rows of logits."""
    words: Words
    """`[len(rows), words]`: id i may come next where bit i % 32 of word i // 32 is set."""
    ended: list[int]
    """Those of `rows` after which no id may come."""


class MaskBuilder:
    """Computes the masks of a step beside it. Its threads begin with the first step that needs a mask."""

    def __init__(self, vocab_size: int, threads: int) -> None:
        """`vocab_size`: of the model's logits. `threads`: how many matchers are asked at once."""
        self._vocab_size = vocab_size
        self._threads = threads
        self._waiting: ThreadPoolExecutor | None = None
        self._executor: LLExecutor

    def start(self, places: SequenceOf[Place]) -> Future[Masks]:
        """Begin the masks of a step. Until they are there, the constraints must not be used otherwise."""
        if self._waiting is None:
            self._waiting = ThreadPoolExecutor(1, thread_name_prefix="masks")
            self._executor = LLExecutor(num_threads=self._threads)
        return self._waiting.submit(self._build, places)

    def _build(self, places: SequenceOf[Place]) -> Masks:
        rows = [place.row + n for place in places for n in range(1 + len(place.draft))]
        vocabulary = places[0].constraint.vocabulary  # a replica has one
        width = max(vocabulary.mask_words, -(-self._vocab_size // 32))
        words = np.zeros((len(rows), width), dtype=np.uint32)
        firsts = np.cumsum([0, *(1 + len(place.draft) for place in places)]).tolist()
        self._fill(places, firsts, words)
        accept = vocabulary.accept_id
        accept_bit = np.uint32(1 << accept % 32)
        accepting = words[:, accept // 32] & accept_bit != 0
        words[:, accept // 32] &= ~accept_bit  # a model whose vocabulary is padded has a logit there
        self._cut(words)
        for place, first in zip(places, firsts, strict=False):
            own = slice(first, first + 1 + len(place.draft))
            if place.constraint.matcher.is_error():
                words[own] = 0
            else:
                place.constraint.end_rows(words[own], accepting[own])
        ended = np.flatnonzero(~words.any(axis=1)).tolist()
        return Masks(rows, words, [rows[place] for place in ended])

    def _fill(self, places: SequenceOf[Place], firsts: SequenceOf[int], words: Words) -> None:
        """Let each matcher write its masks. Python's global lock is dropped meanwhile."""
        count, width = words.shape
        indexed = list(zip(places, firsts, strict=False))
        plain = [(place.constraint.matcher, first) for place, first in indexed if not place.draft]
        drafted = [(place.constraint.matcher, first, list(place.draft)) for place, first in indexed if place.draft]
        if plain:
            self._executor.unsafe_compute_mask_ptr(plain, words.ctypes.data, 4 * width, count)
        if drafted:
            self._executor.unsafe_compute_mask_ptr_with_draft_token(drafted, words.ctypes.data, 4 * width, count)

    def _cut(self, words: Words) -> None:
        """Clear the bits of ids that the model does not have."""
        whole, rest = divmod(self._vocab_size, 32)
        if rest:
            words[:, whole] &= np.uint32((1 << rest) - 1)
            whole += 1
        words[:, whole:] = 0
