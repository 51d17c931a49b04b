"""Journal stores for tests: one in memory that can be down, forget, or lose an owner's lease."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from serve_app.resume.journal_store import (
    Append,
    AppendResult,
    JournalLimits,
    JournalView,
    LeaseStatus,
    StoreUnavailable,
)
from serve_app.resume.memory_store import MemoryJournals, MemoryJournalStore


def loop_time() -> float:
    """The running loop's clock, which a test may simulate."""
    return asyncio.get_running_loop().time()


class BrokenStore(MemoryJournalStore):
    """A `JournalStore` in memory with switches for what goes wrong."""

    def __init__(self, limits: JournalLimits) -> None:
        super().__init__(limits)
        self.journals = MemoryJournals(limits, loop_time)
        self.down = False
        """Every call fails."""
        self.forgets_answers = False
        """Appends are done, and their answers are lost."""
        self.appends: list[Append] = []

    def forget_all(self) -> None:
        """As a store that was restarted."""
        self.journals = MemoryJournals(self.journals.limits, loop_time)

    async def create(self, stream_id: str, owner: str, document: bytes, tenant: str = "") -> LeaseStatus:
        self._check()
        return await super().create(stream_id, owner, document, tenant)

    async def append(self, appends: Sequence[Append]) -> list[AppendResult]:
        self._check()
        self.appends += appends
        answers = await super().append(appends)
        if self.forgets_answers:
            raise StoreUnavailable("the answer was lost")
        return answers

    async def read(self, stream_id: str, position: int, wait_s: float = 0.0) -> JournalView | None:
        self._check()
        return await super().read(stream_id, position, wait_s)

    async def acquire(self, stream_id: str, owner: str) -> bool:
        self._check()
        return await super().acquire(stream_id, owner)

    def _check(self) -> None:
        if self.down:
            raise StoreUnavailable("the store is down")
