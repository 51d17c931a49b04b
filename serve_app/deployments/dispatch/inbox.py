"""The replies of one attempt, in order, whether they come through a channel or by Serve's call. Knows no Ray.

Promises that a waiting reader is woken at once.
"""

from __future__ import annotations

import asyncio
from collections import deque

from serve_app.core import Reply
from serve_app.idle_timeout import TimedWaiter


class Inbox:
    """The inbox of one attempt, on one event loop, with one reader."""

    __slots__ = ("_failed", "_ready", "_waiter", "broken", "by_call")

    def __init__(self) -> None:
        self._ready: deque[Reply] = deque()
        self._waiter = TimedWaiter(asyncio.get_running_loop())
        self._failed = False
        self.by_call = False
        """The attempt's replies come by Serve's call, and not through a channel."""
        self.broken: set[str] = set()
        """Replicas whose channels broke, so that replies may be lost."""

    def put(self, reply: Reply) -> None:
        """Add a reply that has come through a channel."""
        self._ready.append(reply)
        self._waiter.wake()

    def put_by_call(self, reply: Reply) -> None:
        """Add a reply that has come by Serve's call."""
        self.by_call = True
        self.put(reply)

    def fail(self) -> None:
        """Serve's call has failed: nothing more comes, also not through a channel."""
        self._failed = True
        self._waiter.wake()

    def lose(self, replica: str) -> None:
        """The channel of this replica broke, and may have held replies of this attempt."""
        if not self.by_call:
            self.broken.add(replica)
            self._waiter.wake()

    async def take(self, timeout_s: float) -> Reply | None:
        """The next reply; None after `timeout_s` without one, or at once when it is known that none can come."""
        if not (self._ready or self.broken or self._failed):
            await self._waiter.wait(timeout_s)
        return self._ready.popleft() if self._ready else None

    def release(self) -> None:
        """Free the timer. Nobody calls `take` afterwards."""
        self._waiter.close()
