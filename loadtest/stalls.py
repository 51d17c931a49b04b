"""When this very process stood still: what its clients waited for meanwhile is not the server's doing."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Self

_TICK_S = 0.01
_STALL_S = 0.02
"""A timer that fires so much later than it was due tells of a stall."""


@dataclass(slots=True)
class Stalls:
    """An async context manager that watches the running event loop. Times are of `time.perf_counter`."""

    seen: list[tuple[float, float]] = field(default_factory=list)
    """(from, until) of each, in their order."""
    _task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._watch(), name="stalls")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _watch(self) -> None:
        while True:
            due = time.perf_counter() + _TICK_S
            await asyncio.sleep(_TICK_S)
            self.woke(due, time.perf_counter())

    def woke(self, due: float, now: float) -> None:
        """A timer that was due then has fired now."""
        if now - due > _STALL_S:
            self.seen.append((due, now))

    def within_s(self, began: float, ended: float) -> float:
        """Seconds between two moments in which this process stood still."""
        return sum(max(0.0, min(ended, until) - max(began, start)) for start, until in self.seen)
