"""What comes for one attempt, by its own way and through a channel, in the order of its tokens.

Promises that a batch that overtook another is held until that has come, and that whoever waits is woken at once. Knows
no Ray.
"""

from __future__ import annotations

import asyncio
from collections import deque

from serve_app.core import Reply, TokenBatch
from serve_app.idle_timeout import Alarm


class Inbox:
    """For one attempt, on one event loop, with one reader."""

    __slots__ = ("_alarm", "_closed", "_early", "_loop", "_next", "_ready", "_waiter", "lost")

    def __init__(self, first_index: int) -> None:
        """`first_index`: position of the first token that the attempt is to bring."""
        self._loop = asyncio.get_running_loop()
        self._next = first_index
        self._ready: deque[Reply] = deque()
        self._early: dict[int, TokenBatch] = {}
        self._waiter: asyncio.Future[None] | None = None
        self._alarm = Alarm(self._loop, self._wake)
        self._closed = False
        self.lost: set[str] = set()
        """Replicas whose channels broke, so that something which they sent may not come."""

    def put(self, reply: Reply) -> None:
        """Add what has come. A `Failure` overtakes everything: it says that no more will come."""
        if isinstance(reply, TokenBatch):
            if reply.first_index > self._next:
                if reply.token_ids or reply.finish_reason is not None:
                    self._early[reply.first_index] = reply
                return
            self._next = max(self._next, reply.first_index + len(reply.token_ids))
        self._ready.append(reply)
        while self._early and (early := self._early.pop(self._next, None)) is not None:
            self._next += len(early.token_ids)
            self._ready.append(early)
            if not early.token_ids:
                break
        self._wake()

    @property
    def torn(self) -> bool:
        """Whether something has come whose predecessor has not."""
        return bool(self._early)

    def close(self) -> None:
        """Nothing more comes by the attempt's own way; a channel may still bring what that overtook."""
        self._closed = True
        self._wake()

    def lose(self, replica: str) -> None:
        """The channel of this replica broke, and may have held something for this attempt."""
        self.lost.add(replica)
        self._wake()

    async def take(self, timeout_s: float) -> Reply | None:
        """The next reply in order; None after `timeout_s` without one, or at once when none can come."""
        if not self._ready and not self.lost and not (self._closed and not self._early):
            self._waiter = self._loop.create_future()
            self._alarm.set(timeout_s)
            try:
                await self._waiter
            finally:
                self._alarm.clear()
                self._waiter = None
        return self._ready.popleft() if self._ready else None

    def release(self) -> None:
        """Nobody takes anything any more."""
        self._alarm.close()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
