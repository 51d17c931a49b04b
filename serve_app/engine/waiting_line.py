"""The sequences that wait for a place or for pages, and the accounts of their tenants.

New ones take turns between tenants (`serve_app.fair_queue`). Those that were preempted, or that a failover brought here
with output, come before new ones, but for one that has made way for other tenants: it waits while these have less than
their share. Batch comes after interactive, in any case. Knows no pages.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable, Collection, Iterator

from serve_app.engine.sequence import Sequence
from serve_app.fair_queue import ExpectedTokens, FairQueue, may_take_from

SEVERAL_WITHIN = 512
"""Requests within which another tenant must have asked, for there to be several."""


class WaitingLine:
    """Who waits, and who is next."""

    def __init__(self) -> None:
        self.tokens = 0
        """Of all that wait: none of them is computed."""
        self._new: FairQueue[Sequence] = FairQueue()
        """Where new sequences wait. Others count as started in it, until they end."""
        self._returning: list[Sequence] = []
        """In their order."""
        self._last_turn = (-1, 0)
        self._expected = ExpectedTokens()
        self._tenant: str | None = None
        """Of the newest request."""
        self._since_another = SEVERAL_WITHIN
        """Requests of that tenant since one of another tenant."""

    @property
    def several_tenants(self) -> bool:
        """More than one tenant has asked lately."""
        return self._since_another < SEVERAL_WITHIN

    def __len__(self) -> int:
        return len(self._returning) + len(self._new)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._returning
        yield from self._new

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait. Its tenant is charged when it starts, for its prompt and the answer to be expected."""
        request, delivered = sequence.request, len(sequence.request.output_token_ids)
        self._since_another = self._since_another + 1 if self._tenant in (None, request.tenant) else 0
        self._tenant = request.tenant
        expected = self._expected.of(request.tenant, request.max_new_tokens - delivered)
        self._new.add(
            sequence,
            tokens=len(sequence.token_ids) + expected,
            tenant=request.tenant,
            weight=request.weight,
            priority=request.priority,
        )
        self.tokens += len(sequence.token_ids)
        if delivered:
            self._new.start(sequence)
            bisect.insort(self._returning, sequence, key=by_order)

    def firsts(self) -> Iterator[Sequence]:
        """The first new sequence of each tenant and class, in the order of their turns."""
        return self._new.firsts()

    def next_of_others(self, tenants: Collection[str]) -> Sequence | None:
        """The interactive sequence that is to be admitted next if the new ones of these tenants are passed over.

        None where one of theirs was preempted and has not come back.
        """
        returning = next((s for s in self._returning if not (s.batch or s.yielded)), None)
        if returning is not None:
            return None if returning.request.tenant in tenants else returning
        able = (s for s in self._new.firsts() if not s.batch and s.request.tenant not in tenants)
        return self._with_turn(next(able, None))

    def next(self, running: Callable[[], Counter[str]]) -> Sequence | None:
        """Who is to be admitted next. `running`: counts each tenant's interactive sequences that run."""
        if not (self._returning or self._new):
            return None
        new = self._with_turn(self._new.first())
        if not self._returning:
            return new
        first = self._returning[0]
        returning = next((s for s in self._returning if s.batch == first.batch and not s.yielded), first)
        if new is None or new.batch:
            return returning
        return new if returning.batch or _comes_before(new, returning, running) else returning

    def _with_turn(self, new: Sequence | None) -> Sequence | None:
        if new is not None:
            number, more = self._last_turn
            new.turn = max((new.arrival, 0), (number, more + 1))
        return new

    def leave(self, sequence: Sequence) -> None:
        """The sequence is admitted: it is the one that `next` or `next_of_others` told."""
        if sequence in self._new:
            self._new.start(sequence)
            self._last_turn = sequence.turn
        else:
            self._returning.remove(sequence)
        self.tokens -= len(sequence.token_ids)

    def come_back(self, sequence: Sequence) -> None:
        """The sequence was preempted and waits again."""
        self.tokens += len(sequence.token_ids)
        bisect.insort(self._returning, sequence, key=by_order)

    def drop(self, sequence: Sequence) -> None:
        """Nobody wants the sequence any more, which waits."""
        self.tokens -= len(sequence.token_ids)
        if sequence in self._new:
            self._new.remove(sequence)
        else:
            self._returning.remove(sequence)
            self.ended(sequence)

    def ended(self, sequence: Sequence) -> None:
        """A sequence that has left the line has ended: its tenant is charged for what it really took."""
        made = sequence.output_len - len(sequence.request.output_token_ids)
        self._new.end(sequence, sequence.prompt_len - sequence.cached_prompt_tokens + made)
        if made:
            self._expected.ended(sequence.request.tenant, made)


def _comes_before(new: Sequence, returning: Sequence, running: Callable[[], Counter[str]]) -> bool:
    """Whether the tenant of `new` has less than its share beside that of `returning`, which has made way for others."""
    mine, other = new.request, returning.request
    if not returning.yielded or mine.tenant == other.tenant:
        return False
    count = running()
    return may_take_from(count[mine.tenant], mine.weight, count[other.tenant] + 1, other.weight)


def by_order(sequence: Sequence) -> tuple[bool, bool, tuple[int, int]]:
    """Sort key of sequences."""
    return sequence.order
