"""A time limit that is put off again and again, as by each token of a stream, and hardly ever reached.

`loop.call_later` and `cancel` for each token cost more than the rest of its way through a queue. This keeps one timer
that looks, when it goes off, whether the limit was put off meanwhile. Knows no stream; imports no other room.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

STALL_S = 0.1
"""A timer that goes off so late says that the loop, or the process, stood still: what came meanwhile is unread."""
MAX_GRACE_S = 1.0


class Alarm:
    """For the callers of one event loop."""

    __slots__ = ("_due", "_loop", "_on_time", "_timer")

    def __init__(self, loop: asyncio.AbstractEventLoop, on_time: Callable[[], object]) -> None:
        """`on_time` is called in the loop, once for each limit that is reached.

        After a stall of the loop it is called as much later as that was long, at most `MAX_GRACE_S`: nobody is taken
        for silent by one who did not listen.
        """
        self._loop = loop
        self._on_time = on_time
        self._due: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    def set(self, delay_s: float) -> None:
        """The limit is `delay_s` from now, whatever it was."""
        due = self._due = self._loop.time() + delay_s
        if self._timer is not None:
            if self._timer.when() <= due:
                return
            self._timer.cancel()
        self._timer = self._loop.call_at(due, self._look)

    def clear(self) -> None:
        """There is no limit for now. The timer stays: it is likely to be wanted again before it goes off."""
        self._due = None

    def close(self) -> None:
        """There is no limit any more, and no timer."""
        self._due = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        if self._due is None:
            return
        late_s = self._loop.time() - self._due
        if late_s > STALL_S:
            self._due = self._loop.time() + min(late_s, MAX_GRACE_S)
        if late_s < 0 or late_s > STALL_S:
            self._timer = self._loop.call_at(self._due, self._look)
        else:
            self._due = None
            self._on_time()
