"""Carries replies from the engine's thread to the event loops of its callers.

A step wakes each loop once, whatever the number of streams. A slow caller gets all batches that have
arrived joined into one.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence as SequenceOf

from msgspec.structs import replace

from serve_app.core import Reply, TokenBatch
from serve_app.engine.core import ends
from serve_app.idle_timeout import TimedWaiter


class ReplyStream:
    """The replies for one caller, put in on its event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._replies: deque[Reply] = deque()
        self._waiter = TimedWaiter(loop)

    def put(self, reply: Reply) -> None:
        self._replies.append(reply)
        self._waiter.wake()

    async def take(self, timeout_s: float) -> Reply | None:
        """The next reply, with all batches that have arrived joined into one; None when none arrives in time."""
        if not self._replies:
            await self._waiter.wait(timeout_s)
            if not self._replies:
                return None
        first = self._replies.popleft()
        while isinstance(first, TokenBatch) and self._replies and isinstance(self._replies[0], TokenBatch):
            first = _join(first, self._replies.popleft())  # type: ignore[arg-type]
        if ends(first):
            self._waiter.close()
        return first


def _join(first: TokenBatch, second: TokenBatch) -> TokenBatch:
    logprobs = None if first.logprobs is None else (*first.logprobs, *(second.logprobs or ()))
    return replace(
        second,
        first_index=first.first_index,
        token_ids=first.token_ids + second.token_ids,
        logprobs=logprobs,
        stats=second.stats or first.stats,
        prompt_logprobs=first.prompt_logprobs,
    )


def deliver(replies: SequenceOf[tuple[ReplyStream, Reply]]) -> list[asyncio.AbstractEventLoop]:
    """Put each reply into its stream, on the stream's loop. Returns the loops that are closed and take no replies."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[ReplyStream, Reply]]] = {}
    for stream, reply in replies:
        by_loop.setdefault(stream.loop, []).append((stream, reply))
    closed = []
    for loop, deliveries in by_loop.items():
        try:
            loop.call_soon_threadsafe(_put_all, deliveries)
        except RuntimeError:
            closed.append(loop)
    return closed


def _put_all(deliveries: list[tuple[ReplyStream, Reply]]) -> None:
    for stream, reply in deliveries:
        stream.put(reply)
