"""A time limit that is postponed again and again, e.g. by each token of a stream, and hardly ever reached.

`loop.call_later` and `cancel` for each token cost more than the rest of its way through a queue. This keeps one timer
that checks, when it fires, whether the limit was postponed meanwhile. Imports nothing else of serve_app.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

TICK_S = 0.5
"""How often a timeout with `ignores_stalls` checks whether its own event loop stood still."""
STALL_S = 0.1
"""A timer that fires this late shows that the loop or the process stood still: what arrived meanwhile is unread."""


class IdleTimeout:
    """One such time limit. All calls come from one event loop."""

    __slots__ = ("_due", "_ignores_stalls", "_looks_at", "_loop", "_on_time", "_set_at", "_spared", "_timer")

    def __init__(
        self, loop: asyncio.AbstractEventLoop, on_time: Callable[[], object], *, ignores_stalls: bool = False
    ) -> None:
        """`on_time` is called in the loop, once for each limit that is reached.

        `ignores_stalls`: only time in which the loop ran counts, so that a process that was paused does not treat
        others as unresponsive.
        """
        self._loop = loop
        self._on_time = on_time
        self._ignores_stalls = ignores_stalls
        self._due: float | None = None
        self._set_at = 0.0
        self._spared = False
        self._timer: asyncio.Handle | None = None
        self._looks_at = 0.0
        """When the timer fires, by the loop's clock. uvloop's handle has no `when()` once that time has passed."""

    def set(self, delay_s: float) -> None:
        """Set the limit to `delay_s` from now, whatever it was."""
        self._set_at = now = self._loop.time()
        self._due = now + delay_s
        self._spared = False
        self._look_again(now, self._due)

    def clear(self) -> None:
        """Remove the limit but not the timer: a new limit is likely to be set before the timer fires."""
        self._due = None

    def close(self) -> None:
        """Remove the limit and the timer."""
        self._due = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look_again(self, now: float, due: float) -> None:
        when = min(due, now + TICK_S) if self._ignores_stalls else due
        if self._timer is not None:
            if self._looks_at <= when:
                return
            self._timer.cancel()
        self._looks_at = when
        self._timer = self._loop.call_at(when, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._due is None:
            return
        now = self._loop.time()
        late_s = now - max(self._looks_at, self._set_at)  # a stall before the limit was set doesn't count
        if self._ignores_stalls and late_s > STALL_S:
            self._due += late_s
            if not self._spared:  # only once: a loop that is always late would postpone it for ever
                self._spared = True
                self._due = max(self._due, now + STALL_S)
        if now < self._due:
            self._look_again(now, self._due)
        else:
            self._due = None
            self._on_time()


class TimedWaiter:
    """Lets one task of an event loop wait to be woken, for a limited time."""

    __slots__ = ("_loop", "_timeout", "_waiting")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._timeout = IdleTimeout(loop, self.wake)
        self._waiting: asyncio.Future[None] | None = None

    async def wait(self, timeout_s: float) -> None:
        """Return when woken, or after `timeout_s`."""
        self._waiting = self._loop.create_future()
        self._timeout.set(timeout_s)
        try:
            await self._waiting
        finally:
            self._timeout.clear()
            self._waiting = None

    def wake(self) -> None:
        """Let the task go on, if it waits."""
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def close(self) -> None:
        """Cancel the timer. Called when the task waits no more."""
        self._timeout.close()
