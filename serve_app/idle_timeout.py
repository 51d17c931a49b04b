"""A time limit that is put off again and again, as by each token of a stream, and hardly ever reached.

`loop.call_later` and `cancel` for each token cost more than the rest of its way through a queue. This keeps one timer
that looks, when it goes off, whether the limit was put off meanwhile. Knows no stream; imports no other room.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

TICK_S = 0.5
"""How often one that judges others looks whether it stood still itself."""
STALL_S = 0.1
"""A timer that goes off so late says that the loop, or the process, stood still: what came meanwhile is unread."""


class IdleTimeout:
    """For the callers of one event loop."""

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
        """When the timer goes off. uvloop's handle does not know: one whose moment has passed has no `when()`."""

    def set(self, delay_s: float) -> None:
        """The limit is `delay_s` from now, whatever it was."""
        self._set_at = now = self._loop.time()
        self._due = now + delay_s
        self._spared = False
        self._look_again(now, self._due)

    def clear(self) -> None:
        """There is no limit for now. The timer stays: it is likely to be wanted again before it goes off."""
        self._due = None

    def close(self) -> None:
        """There is no limit any more, and no timer."""
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
        late_s = now - max(self._looks_at, self._set_at)  # a stall before the limit was set is none of its own
        if self._ignores_stalls and late_s > STALL_S:
            self._due += late_s
            if not self._spared:  # once: turns that are always late would put it off for ever
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
        """Nobody waits any more: no timer stays behind."""
        self._timeout.close()
