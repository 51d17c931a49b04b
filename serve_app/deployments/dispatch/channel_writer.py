"""The model server's end of the channels: sends a step's replies for all streams of an ingress process in one message.

A channel is a TCP connection of its own: through Serve, each message costs both processes about a millisecond of Python
and gRPC. Promises that nothing is delayed, that a reader sees the channel break if replies in it are lost, and that a
stream whose ingress has no channel goes by Serve's call. Knows no Ray and no text.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
from collections.abc import AsyncGenerator, AsyncIterable, Callable
from typing import cast

from serve_app.core import GenerationRequest, ReplicaLoad, Reply
from serve_app.deployments.dispatch.channel_wire import (
    LOAD,
    ChannelAddress,
    ChannelItem,
    encode,
    keep_alive,
    read_greeting,
)

logger = logging.getLogger(__name__)

GREETING_S = 5.0
"""A connection without a complete greeting after this long is closed."""
MAX_GREETING_BYTES = 1024
UNREACHABLE_S = 3.0
"""A channel is closed when the reader's machine acknowledges no data for this long, where TCP supports it (Linux)."""
MAX_UNREAD_BYTES = 2**23
"""A channel with more unsent bytes than this is closed. It is about 500,000 tokens: the reader's process is stopped."""


class TokenChannels:
    """The channels of one replica, for its event loop."""

    def __init__(self) -> None:
        self.messages = 0
        """Number of messages sent so far."""
        self.address: ChannelAddress | None = None
        self._open: dict[str, Channel] = {}
        self._load: ReplicaLoad | None = None
        self._server: asyncio.Server | None = None

    async def listen(self, host: str) -> None:
        """Let ingresses open channels at this address of the machine; without it all replies go by Serve's calls."""
        secret = secrets.token_hex(16)
        try:
            self._server = await asyncio.get_running_loop().create_server(lambda: Channel(self, secret), host, 0)
        except OSError as error:
            logger.warning(
                "no token channels at %s: %s; tokens go through Serve's calls, which costs more CPU time", host, error
            )
            return
        port = self._server.sockets[0].getsockname()[1]
        self.address = ChannelAddress(host, port, secret)

    def of(self, ingress_id: str) -> Channel | None:
        """The channel to this ingress process; None where there is none."""
        return self._open.get(ingress_id)

    def opened(self, ingress_id: str, channel: Channel) -> None:
        """Called by a channel after its greeting. Closes an older one of the same ingress, which has given that up."""
        previous, self._open[ingress_id] = self._open.get(ingress_id), channel
        if previous is not None:
            previous.close()
        if self._load is not None:
            channel.tell(self._load)

    def tell(self, load: ReplicaLoad) -> None:
        """Send the replica's load through every channel, and through each that opens until the next call."""
        self._load = load
        for channel in self._open.values():
            channel.tell(load)

    def closed(self, ingress_id: str, channel: Channel) -> None:
        """Called by a channel whose connection has ended."""
        if self._open.get(ingress_id) is channel:
            del self._open[ingress_id]


class Channel(asyncio.Protocol):
    """One connection. All streams of a step `put` their replies before the event loop runs `_flush`."""

    def __init__(self, channels: TokenChannels, secret: str) -> None:
        self._channels = channels
        self._secret = secret
        self._loop = asyncio.get_running_loop()
        self._ingress_id = ""
        self._greeting = b""
        self._items: list[ChannelItem] = []
        self._load: ReplicaLoad | None = None
        """To be sent with the next message."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        self._transport = cast("asyncio.Transport", transport)
        keep_alive(transport)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            connection = transport.get_extra_info("socket")
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * UNREACHABLE_S))
        self._impatience = self._loop.call_later(GREETING_S, self.close)

    def data_received(self, data: bytes) -> None:
        """Called by asyncio. An ingress sends nothing after its greeting."""
        self._greeting += data
        line, end, more = self._greeting.partition(b"\n")
        if self._ingress_id or more or len(line) > MAX_GREETING_BYTES:
            self._refuse()
        elif end:
            self._impatience.cancel()
            if (ingress_id := read_greeting(line, self._secret)) is None:
                self._refuse()
                return
            self._ingress_id = ingress_id
            self._transport.write(encode(()))
            self._channels.opened(ingress_id, self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio."""
        self._impatience.cancel()
        self._channels.closed(self._ingress_id, self)

    def put(self, attempt: int, reply: Reply) -> bool:
        """Queue a reply; it is sent with all others of this turn of the loop. False if the connection has ended."""
        if self._transport.is_closing():
            return False
        if not self._items:
            self._loop.call_soon(self._flush)
        self._items.append((attempt, reply))
        return True

    def tell(self, load: ReplicaLoad) -> None:
        """Queue the replica's load; it goes with the replies of the same step, if there are any for this channel."""
        if self._load is None and not self._transport.is_closing():
            # The step's replies wake tasks, which `put` them in the next turn of the loop.
            self._loop.call_soon(self._loop.call_soon, self._flush)
        self._load = load

    def close(self) -> None:
        """Abort the connection: unsent replies are lost, and the reader sees the channel break."""
        self._transport.abort()

    def _refuse(self) -> None:
        logger.warning("closed a connection to the token channels that is not from an ingress replica")
        self.close()

    def _flush(self) -> None:
        if self._load is not None:
            self._items.append((LOAD, self._load))
            self._load = None
        if not self._items or self._transport.is_closing():
            return
        message = encode(self._items)
        self._items.clear()
        self._transport.write(message)
        self._channels.messages += 1
        if self._transport.get_write_buffer_size() > MAX_UNREAD_BYTES:
            logger.warning("%s does not read its token channel; closed", self._ingress_id)
            self.close()


async def send(
    request: GenerationRequest,
    replies: AsyncIterable[Reply],
    channels: TokenChannels,
    gone: Callable[[str], bool] = lambda ingress_id: False,
) -> AsyncGenerator[Reply, None]:
    """Send the replies of one attempt through the channel of its ingress, or yield them, to go by Serve's call.

    The way is chosen at the first reply and holds for all of them, so that no reply can overtake another. Ends early
    when the ingress is `gone`, or when its channel has ended, which the ingress notices too.
    """
    channel: Channel | None = None
    decided = False
    async for reply in replies:  # one each second at least
        if gone(request.ingress_id):
            return
        if not decided:
            decided, channel = True, channels.of(request.ingress_id)
        if channel is None:
            yield reply
        elif not channel.put(request.attempt, reply):
            return
