"""The model server's end of the channels: what a step made for all streams of one ingress replica, in one message.

Serve's cost is by the message, not by the token. Promises that nothing is delayed, that what is put into a channel was
handed to Serve before the channel ends, and that a stream without a channel goes its own way. Knows no Ray and no text.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from serve_app.messages import GenerationRequest, Reply, TokenBatch, TokenLogprobs

IDLE_S = 2.0
"""A channel without streams ends after so long. While it is there it is one of the replica's ongoing requests."""

ChannelItem = tuple[int, int, tuple[int, ...], tuple[TokenLogprobs, ...] | None]
"""A batch without a last word and without counters: number of the attempt, first index, token ids, logprobs."""


@dataclass(frozen=True, slots=True)
class ChannelRequest:
    """Asks one replica, and no other, for the channel of one caller."""

    caller: str
    replica: str
    """Its id, as Serve has it."""


class TokenChannels:
    """The channels of one replica, for its event loop."""

    def __init__(self) -> None:
        self._open: dict[str, _Channel] = {}
        self._streams: Counter[str] = Counter()

    @contextmanager
    def stream(self, caller: str) -> Iterator[None]:
        """A stream of this caller runs as long as the block does."""
        self._streams[caller] += 1
        try:
            yield
        finally:
            self._streams[caller] -= 1
            if not self._streams[caller]:
                del self._streams[caller]

    def put(self, request: GenerationRequest, reply: Reply) -> bool:
        """Send the reply through its caller's channel; False when it has none or the reply goes the stream's own way.

        So do last words, whose end they are, and the counters that come with an attempt's first tokens.
        """
        channel = self._open.get(request.caller)
        if channel is None or not isinstance(reply, TokenBatch):
            return False
        if reply.finish_reason is not None or reply.stats is not None:
            return False
        channel.put((request.attempt, reply.first_index, reply.token_ids, reply.logprobs))
        return True

    async def read(self, caller: str) -> AsyncGenerator[tuple[ChannelItem, ...], None]:
        """All that is put for `caller` from now on: first nothing, which says that the channel is open.

        Ends when the caller has had no stream for a while. A later channel of the same caller takes its place.
        """
        channel = self._open[caller] = _Channel()
        try:
            yield ()
            while await channel.wait(IDLE_S) or caller in self._streams:
                if items := channel.take():
                    yield items
        finally:
            if self._open.get(caller) is channel:
                del self._open[caller]


class _Channel:
    """What waits to be sent. The streams of one step put theirs in before whoever waits is woken."""

    def __init__(self) -> None:
        self._items: list[ChannelItem] = []
        self._arrived = asyncio.Event()

    def put(self, item: ChannelItem) -> None:
        self._items.append(item)
        self._arrived.set()

    def take(self) -> tuple[ChannelItem, ...]:
        items = tuple(self._items)
        self._items.clear()
        self._arrived.clear()
        return items

    async def wait(self, timeout_s: float) -> bool:
        """Whether there is something to take."""
        if not self._items:
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._arrived.wait()
        return bool(self._items)
