"""The masks of a step: computed on threads of their own while the model computes, none of which a step waits for long.

The masks of a step are computed together. Where they are late, the step leaves their sequences out: their tokens come
in a later step, and are the same. For a while afterwards the masks of each of these sequences are computed apart, so
that a slow grammar holds up no other. Yet sequences of one grammar share its lexer: to add a token to one of them, the
engine's thread may wait for the mask of another one to end.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np
from llguidance import LLExecutor

from serve_app.engine.constraint import BuiltMasks, Constraint, PendingMask, Words
from serve_app.grammar import GrammarError, yield_to_others

GRACE_S = 0.025
"""How long a step waits for masks after its forward, where it has other rows. Of the demo model's masks 99 % take less
than 0.4 ms, and no mask of a grammar that an ingress accepts should take longer than this."""
WATCHED_GRACE_S = 0.002
"""The same, for a sequence whose mask was late before. A forward on a GPU has only begun when this time does."""
ALONE_GRACE_S = 0.25
"""How long it waits where no row could be sampled without them."""
WATCHED_STEPS = 16
"""How many masks of a sequence must be in time before they are computed together with others again."""


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
    """Which rows of logits, of those that are left when the `late` ones are taken out."""
    words: Words
    """`[len(rows), words]`: id i may come next where bit i % 32 of word i // 32 is set."""
    ended: list[int]
    """Those of `rows` after which no id may come."""
    late: frozenset[int] = frozenset()
    """The rows of logits whose masks are not there yet."""


class StepMasks:
    """The masks of one step, under way."""

    def __init__(self, builder: MaskBuilder, places: SequenceOf[Place], pending: SequenceOf[PendingMask]) -> None:
        self._builder = builder
        self._places = places
        self._pending = pending

    def collect(self, *, others: bool) -> Masks:
        """The masks that are there, after waiting for a moment. `others`: whether rows without a grammar wait, too.

        For a constraint that is watched a step waits less, unless no row at all could be sampled.
        A constraint whose mask is late keeps it as `pending`, and so does one whose grammar is compiled anew.
        """
        pairs = list(zip(self._places, self._pending, strict=True))
        wait({mask.future for place, mask in pairs if not place.constraint.watched}, timeout=GRACE_S)
        futures = {mask.future for mask in self._pending}
        wait(futures, timeout=WATCHED_GRACE_S)
        if not others and not any(mask.done for mask in self._pending):
            wait(futures, timeout=ALONE_GRACE_S, return_when=FIRST_COMPLETED)
        ready: list[tuple[Place, PendingMask]] = []
        late: list[int] = []
        for place, mask in pairs:
            if self._is_there(place.constraint, mask):
                ready.append((place, mask))
            else:
                late.extend(range(place.row, place.row + 1 + len(place.draft)))
        return self._joined(ready, late)

    def _is_there(self, constraint: Constraint, mask: PendingMask) -> bool:
        if not mask.done:
            constraint.pending, constraint.watched = mask, WATCHED_STEPS
            return False
        if mask.has_error():
            # Where computing the masks raised an error, nobody knows whose it is.
            # A draft may have led where nothing can follow, which says nothing of the output.
            unknown = mask.error() is not None or mask.drafted
            may_recover = constraint.can_recover if unknown else constraint.may_recover
            if may_recover and not mask.final:
                constraint.pending, constraint.watched = self._builder.recover(constraint), WATCHED_STEPS
                return False
            if (error := mask.error()) is not None:
                constraint.fail(error)
        constraint.pending, constraint.watched = None, max(0, constraint.watched - 1)
        return True

    def _joined(self, ready: list[tuple[Place, PendingMask]], late: list[int]) -> Masks:
        rows = [place.row + n for place, _ in ready for n in range(1 + len(place.draft))]
        if late:
            rows = [row - bisect_left(late, row) for row in rows]
        words = self._words(ready, len(rows))
        ended = np.flatnonzero(np.bitwise_or.reduce(words, axis=1) == 0).tolist()
        return Masks(rows, words, [rows[number] for number in ended], frozenset(late))

    def _words(self, ready: list[tuple[Place, PendingMask]], rows: int) -> Words:
        first = ready[0][1].future if ready else None
        if first is not None and all(mask.future is first for _, mask in ready) and first.exception() is None:
            words = first.result()[0]
            # Of all places, and in their order: nothing is to be copied. Masks that were late may be in another order.
            if len(words) == rows and all(mask.number == number for number, (_, mask) in enumerate(ready)):
                return words
        parts = [
            mask.words(1 + len(place.draft))
            if mask.error() is None
            else np.zeros((1 + len(place.draft), self._builder.width(place.constraint)), dtype=np.uint32)
            for place, mask in ready
        ]
        return np.concatenate(parts) if parts else np.zeros((0, 1), dtype=np.uint32)


class MaskBuilder:
    """Computes masks beside the steps. Its threads begin with the first step that needs a mask."""

    def __init__(self, vocab_size: int, threads: int) -> None:
        """`vocab_size`: of the model's logits. `threads`: how many matchers are asked at once."""
        self._vocab_size = vocab_size
        self._threads = threads
        self._together: ThreadPoolExecutor | None = None
        self._apart: ThreadPoolExecutor
        self._anew: ThreadPoolExecutor
        self._executor: LLExecutor

    def start(self, places: SequenceOf[Place]) -> StepMasks:
        """Begin the masks of a step. Until they are collected, the constraints must not be used otherwise."""
        if self._together is None:
            self._together = ThreadPoolExecutor(1, thread_name_prefix="masks")
            self._apart = ThreadPoolExecutor(max(2, self._threads), thread_name_prefix="slow masks")
            self._anew = ThreadPoolExecutor(2, thread_name_prefix="grammars anew", initializer=yield_to_others)
            self._executor = LLExecutor(num_threads=self._threads)
        joint = [place for place in places if place.constraint.pending is None and not place.constraint.watched]
        future = self._together.submit(self._build_together, joint) if joint else None
        pending: list[PendingMask] = []
        number = 0
        for place in places:
            constraint = place.constraint
            if constraint.pending is not None:
                pending.append(constraint.pending)
            elif constraint.watched:
                alone = self._apart.submit(self._build_alone, constraint)
                pending.append(PendingMask(alone, 0, final=False))
            else:
                assert future is not None
                pending.append(PendingMask(future, number, final=False, drafted=bool(place.draft)))
                number += 1
        return StepMasks(self, places, pending)

    def recover(self, constraint: Constraint) -> PendingMask:
        """Begin the mask of a constraint after letting it recover from an error."""

        def build() -> BuiltMasks:
            try:
                constraint.recover()
            except GrammarError as error:
                constraint.fail(error)
            if constraint.complete:  # by its last id, which the broken matcher did not take: no id follows
                return np.zeros((1, self.width(constraint)), dtype=np.uint32), [0], set()
            return self._build_alone(constraint)

        return PendingMask(self._anew.submit(build), 0, final=True)

    def width(self, constraint: Constraint) -> int:
        """32-bit words of a mask."""
        return max(constraint.vocabulary.mask_words, -(-self._vocab_size // 32))

    def _build_alone(self, constraint: Constraint) -> BuiltMasks:
        words = np.zeros((1, self.width(constraint)), dtype=np.uint32)
        if not constraint.has_error:
            mask = np.frombuffer(constraint.matcher.compute_bitmask(), dtype=np.uint32)
            words[0, : len(mask)] = mask
        return self._finished(words, [Place(0, constraint, ())], [0])

    def _build_together(self, places: SequenceOf[Place]) -> BuiltMasks:
        """Python's global lock is dropped while the matchers write their masks."""
        firsts = np.cumsum([0, *(1 + len(place.draft) for place in places)]).tolist()
        count, width = firsts.pop(), self.width(places[0].constraint)  # a replica has one vocabulary
        words = np.zeros((count, width), dtype=np.uint32)
        indexed = list(zip(places, firsts, strict=True))
        plain = [(place.constraint.matcher, first) for place, first in indexed if not place.draft]
        drafted = [(place.constraint.matcher, first, list(place.draft)) for place, first in indexed if place.draft]
        if plain:
            self._executor.unsafe_compute_mask_ptr(plain, words.ctypes.data, 4 * width, count)
        if drafted:
            self._executor.unsafe_compute_mask_ptr_with_draft_token(drafted, words.ctypes.data, 4 * width, count)
        return self._finished(words, places, firsts)

    def _finished(self, words: Words, places: SequenceOf[Place], firsts: list[int]) -> BuiltMasks:
        """Allow the ids that end the outputs, and no id that the model does not have."""
        accept = places[0].constraint.vocabulary.accept_id
        accept_bit = np.uint32(1 << accept % 32)
        accepting = words[:, accept // 32] & accept_bit != 0
        words[:, accept // 32] &= ~accept_bit  # a model whose vocabulary is padded has a logit there
        self._cut(words)
        broken: set[int] = set()
        for number, (place, first) in enumerate(zip(places, firsts, strict=True)):
            own = slice(first, first + 1 + len(place.draft))
            if place.constraint.has_error:
                words[own] = 0
                broken.add(number)
            else:
                place.constraint.end_rows(words[own], accepting[own])
        return words, firsts, broken

    def _cut(self, words: Words) -> None:
        """Clear the bits of ids that the model does not have."""
        whole, rest = divmod(self._vocab_size, 32)
        if rest:
            words[:, whole] &= np.uint32((1 << rest) - 1)
            whole += 1
        words[:, whole:] = 0


def wait_for_any(constraints: Iterable[Constraint], timeout_s: float) -> None:
    """Wait until the mask of one of them is there."""
    futures = {constraint.pending.future for constraint in constraints if constraint.pending is not None}
    wait(futures, timeout=timeout_s, return_when=FIRST_COMPLETED)
