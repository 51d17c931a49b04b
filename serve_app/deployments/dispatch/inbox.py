"""What comes for one attempt, in order, by whichever way its replica has chosen. Knows no Ray.

Promises that whoever waits is woken at once.
"""

from __future__ import annotations

import asyncio
from collections import deque

from serve_app.core import Reply
from serve_app.idle_timeout import TimedWaiter


class Inbox:
    """For one attempt, on one event loop, with one reader."""

    __slots__ = ("_failed", "_ready", "_waiter", "broken", "by_call")

    def __init__(self) -> None:
        self._ready: deque[Reply] = deque()
        self._waiter = TimedWaiter(asyncio.get_running_loop())
        self._failed = False
        self.by_call = False
        """Its replies come by Serve's call, and not through a channel."""
        self.broken: set[str] = set()
        """Replicas whose channels broke, so that something which they sent may not come."""

    def put(self, reply: Reply) -> None:
        """Add what has come through a channel."""
        self._ready.append(reply)
        self._waiter.wake()

    def put_by_call(self, reply: Reply) -> None:
        """Add what has come by Serve's call."""
        self.by_call = True
        self.put(reply)

    def fail(self) -> None:
        """Serve's call has failed: nothing more comes, also not through a channel."""
        self._failed = True
        self._waiter.wake()

    def lose(self, replica: str) -> None:
        """The channel of this replica broke, and may have held something for this attempt."""
        if not self.by_call:
            self.broken.add(replica)
            self._waiter.wake()

    async def take(self, timeout_s: float) -> Reply | None:
        """The next reply; None after `timeout_s` without one, or at once when it is known that none can come."""
        if not (self._ready or self.broken or self._failed):
            await self._waiter.wait(timeout_s)
        return self._ready.popleft() if self._ready else None

    def release(self) -> None:
        """Nobody takes anything any more."""
        self._waiter.close()
