"""Journals in the memory of one process: the rules of a `JournalStore`, with a clock that the caller provides.

Promises bounds on number and bytes, that a journal in use is never dropped for another, and that a journal without an
owner expires. Pure but for `MemoryJournalStore`, which waits for news.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from serve_app.resume.journal_store import Append, AppendResult, JournalLimits, JournalView, LeaseAction, LeaseStatus


@dataclass(slots=True)
class _Journal:
    owner: str
    tenant: str
    document: bytes
    created: float
    leased_until: float
    touched: float
    records: list[bytes] = field(default_factory=list)
    size_bytes: int = 0
    finished: bool = False
    stop: bool = False
    read_at: float | None = None


@dataclass(slots=True)
class _Share:
    """What one tenant holds."""

    journals: int = 0
    size_bytes: int = 0


class MemoryJournals:
    """All journals of one store, in the order in which they were last touched."""

    def __init__(self, limits: JournalLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits
        self._clock = clock
        self._journals: OrderedDict[str, _Journal] = OrderedDict()
        self._shares: defaultdict[str, _Share] = defaultdict(_Share)
        """By tenant."""
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._journals)

    def create(self, stream_id: str, owner: str, document: bytes, tenant: str = "") -> LeaseStatus:
        """See `JournalStore.create`."""
        now = self.expire()
        there = self._journals.get(stream_id)
        if there is not None:
            if there.owner != owner:
                return LeaseStatus.LOST
            self._drop(stream_id)
        if not self._make_room(len(document), 1, now):
            return LeaseStatus.FULL
        journal = _Journal(owner, tenant, document, now, now + self.limits.lease_s, now)
        self._journals[stream_id] = journal
        self._shares[tenant].journals += 1
        self._grow(journal, len(document))
        return LeaseStatus.HELD

    def append(self, append: Append) -> AppendResult:
        """One of `JournalStore.append`."""
        now = self.expire()
        journal = self._journals.get(append.stream_id)
        if journal is not None and journal.owner != append.owner:
            return AppendResult(LeaseStatus.LOST)
        if journal is None or append.position > len(journal.records):
            self._drop(append.stream_id)
            return AppendResult(LeaseStatus.GONE)
        if append.action is LeaseAction.DROP:
            self._drop(append.stream_id)
            return AppendResult(LeaseStatus.HELD)
        self._touch(append.stream_id, journal, now)
        journal.leased_until = now + self.limits.lease_s
        new = append.records[len(journal.records) - append.position :]
        size = sum(map(len, new))
        if not self._make_room(size, 0, now):
            self._drop(append.stream_id)
            return AppendResult(LeaseStatus.FULL)
        journal.records.extend(new)
        self._grow(journal, size)
        if append.action is not LeaseAction.HOLD:
            journal.leased_until = now
            journal.finished = journal.finished or append.action is LeaseAction.FINISH
        unread_s = None if journal.read_at is None else now - journal.read_at
        return AppendResult(LeaseStatus.HELD, unread_s, journal.stop)

    def read(self, stream_id: str, position: int) -> JournalView | None:
        """See `JournalStore.read`; does not wait."""
        now = self.expire()
        journal = self._journals.get(stream_id)
        if journal is None:
            return None
        self._touch(stream_id, journal, now)
        journal.read_at = now
        return JournalView(
            document=journal.document if position == 0 else b"",
            records=tuple(journal.records[position:]),
            finished=journal.finished,
            leased=now < journal.leased_until,
            age_s=now - journal.created,
        )

    def acquire(self, stream_id: str, owner: str) -> bool:
        """See `JournalStore.acquire`."""
        now = self._clock()
        journal = self._journals.get(stream_id)
        if journal is None or journal.finished or now < journal.leased_until:
            return False
        self._touch(stream_id, journal, now)
        journal.owner = owner
        journal.leased_until = now + self.limits.lease_s
        return True

    def ask_to_stop(self, stream_id: str) -> bool:
        """See `JournalStore.ask_to_stop`."""
        journal = self._journals.get(stream_id)
        if journal is not None:
            journal.stop = True
        return journal is not None

    def erase(self, stream_id: str) -> bool:
        """See `JournalStore.erase`."""
        journal = self._journals.get(stream_id)
        if journal is None:
            return False
        self._grow(journal, -journal.size_bytes)
        now = self._clock()
        self._journals[stream_id] = _Journal("", journal.tenant, b"", now, now, now, finished=True)
        self._touch(stream_id, self._journals[stream_id], now)
        return True

    def lease_left_s(self, stream_id: str) -> float:
        """Seconds until another owner may take the journal; 0 when it may now."""
        journal = self._journals.get(stream_id)
        return 0.0 if journal is None else max(0.0, journal.leased_until - self._clock())

    def expire(self) -> float:
        """Drop the journals that have expired. Returns the time of the clock."""
        now = self._clock()
        while self._journals:
            stream_id, oldest = next(iter(self._journals.items()))
            if now < oldest.touched + self.limits.expiry_s:
                break
            self._drop(stream_id)
        return now

    def _make_room(self, size_bytes: int, journals: int, now: float) -> bool:
        """Drop journals that nobody owns until that much more fits: each time the one longest untouched of the tenant
        that holds the largest share."""

        def fits() -> bool:
            return (
                self.size_bytes + size_bytes <= self.limits.max_bytes
                and len(self._journals) + journals <= self.limits.max_journals
            )

        if fits():
            return True
        unowned: defaultdict[str, deque[str]] = defaultdict(deque)
        for stream_id, journal in self._journals.items():
            if journal.leased_until <= now:
                unowned[journal.tenant].append(stream_id)
        while unowned:
            tenant = max(unowned, key=self._share)
            self._drop(unowned[tenant].popleft())
            if fits():
                return True
            if not unowned[tenant]:
                del unowned[tenant]
        return False

    def _share(self, tenant: str) -> float:
        """Of the bytes or of the number, whichever is larger."""
        share = self._shares[tenant]
        return max(share.size_bytes / self.limits.max_bytes, share.journals / self.limits.max_journals)

    def _grow(self, journal: _Journal, size_bytes: int) -> None:
        journal.size_bytes += size_bytes
        self.size_bytes += size_bytes
        self._shares[journal.tenant].size_bytes += size_bytes

    def _touch(self, stream_id: str, journal: _Journal, now: float) -> None:
        journal.touched = now
        self._journals.move_to_end(stream_id)

    def _drop(self, stream_id: str) -> None:
        journal = self._journals.pop(stream_id, None)
        if journal is not None:
            self._grow(journal, -journal.size_bytes)
            share = self._shares[journal.tenant]
            share.journals -= 1
            if not share.journals:
                del self._shares[journal.tenant]


class MemoryJournalStore:
    """A `JournalStore` over `MemoryJournals`, for the callers of one event loop."""

    def __init__(self, limits: JournalLimits) -> None:
        self.journals = MemoryJournals(limits)
        self._news: dict[str, asyncio.Event] = {}
        """By stream id: set on the next write. Only for journals that a reader waits for."""

    async def create(self, stream_id: str, owner: str, document: bytes, tenant: str = "") -> LeaseStatus:
        """See `JournalStore`."""
        return self.journals.create(stream_id, owner, document, tenant)

    async def append(self, appends: Sequence[Append]) -> list[AppendResult]:
        """See `JournalStore`."""
        answers = [self.journals.append(append) for append in appends]
        for append in appends:
            if append.records or append.action is not LeaseAction.HOLD:
                self._tell(append.stream_id)
        return answers

    async def read(self, stream_id: str, position: int, wait_s: float = 0.0) -> JournalView | None:
        """See `JournalStore`."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait_s
        while True:
            view = self.journals.read(stream_id, position)
            left_s = min(deadline - loop.time(), self.journals.lease_left_s(stream_id))
            if view is None or view.records or view.finished or left_s <= 0:
                return view
            news = self._news.setdefault(stream_id, asyncio.Event())
            try:
                async with asyncio.timeout(left_s):
                    await news.wait()
            except TimeoutError:
                self._tell(stream_id)  # removes the event, which nobody may wait for any more

    async def acquire(self, stream_id: str, owner: str) -> bool:
        """See `JournalStore`."""
        return self.journals.acquire(stream_id, owner)

    async def ask_to_stop(self, stream_id: str) -> bool:
        """See `JournalStore`."""
        return self.journals.ask_to_stop(stream_id)

    async def erase(self, stream_id: str) -> bool:
        """See `JournalStore`."""
        erased = self.journals.erase(stream_id)
        self._tell(stream_id)
        return erased

    async def size(self) -> tuple[int, int]:
        """See `JournalStore`."""
        self.journals.expire()
        return len(self.journals), self.journals.size_bytes

    async def aclose(self) -> None:
        """Nothing to let go of."""

    def _tell(self, stream_id: str) -> None:
        news = self._news.pop(stream_id, None)
        if news is not None:
            news.set()
