"""The ingress's end of the channels: takes the messages of each model replica apart, into the inboxes of its attempts.

A channel is opened to each live replica, and lasts as long as the replica. It also brings the replica's load. Promises
that an attempt is told when a channel broke that may have held its tokens. Knows no text.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import Context
from typing import cast

from serve_app.core import MessageError, ReplicaLoad
from serve_app.deployments.dispatch.channel_wire import ChannelAddress, ChannelItem, Frames, greeting, keep_alive
from serve_app.deployments.dispatch.directory import Attempt
from serve_app.deployments.dispatch.inbox import Inbox

logger = logging.getLogger(__name__)

OPEN_S = 5.0
"""A channel that is not open after so long is given up."""
RETRY_S = 30.0
"""Pause after a failed try to open a channel. Without a channel, replies come by Serve's calls."""
OnLoad = Callable[[str, ReplicaLoad | None], None]
"""Called with a replica's id and its load whenever the replica tells it, first when its channel opens. None: its
channel is gone, and nothing is known until another one opens. Called in the channels' event loop; must not raise."""


class ChannelReader:
    """All channels of one ingress process, for its event loop."""

    def __init__(
        self,
        address_of: Callable[[str], ChannelAddress | None],
        ingress_id: str,
        on_load: OnLoad = lambda replica, load: None,
    ) -> None:
        """`address_of`: a replica's channel address, if any. `ingress_id`: "" in an unnamed process: no channels."""
        self._address_of = address_of
        self._on_load = on_load
        self._ingress_id = ingress_id
        self._attempts: dict[int, tuple[Attempt, Inbox]] = {}
        self._channels: dict[str, _Channel] = {}
        self._opening: dict[str, asyncio.Task[None]] = {}
        self._not_before: dict[str, float] = {}

    @contextmanager
    def inbox(self, attempt: Attempt) -> Iterator[Inbox]:
        """The inbox for the attempt's replies, until the block ends."""
        number, inbox = attempt.request.attempt, Inbox()
        self._attempts[number] = attempt, inbox
        try:
            yield inbox
        finally:
            del self._attempts[number]
            inbox.release()

    def connect(self, replicas: Iterable[str]) -> None:
        """Open channels to those of these replicas to which there are none, before their first replies are due."""
        for replica in replicas:
            if not self._ingress_id or replica in self._channels or replica in self._opening:
                continue
            if time.monotonic() < self._not_before.get(replica, 0.0):
                continue
            if (address := self._address_of(replica)) is not None:
                # An empty context: the task belongs to no request, though one started it.
                task = asyncio.create_task(self._open(replica, address), name=f"channel {replica}", context=Context())
                self._opening[replica] = task

    def drop(self, replica: str) -> None:
        """Close the channel to a replica that fell silent: it is frozen or cut off."""
        if (channel := self._channels.get(replica)) is not None:
            channel.close()

    async def _open(self, replica: str, address: ChannelAddress) -> None:
        channel = _Channel(self, replica, greeting(address, self._ingress_id))
        try:
            async with asyncio.timeout(OPEN_S):
                await asyncio.get_running_loop().create_connection(lambda: channel, address.host, address.port)
                await channel.opened
        except OSError as error:  # TimeoutError is one
            now = time.monotonic()
            self._not_before = {name: until for name, until in self._not_before.items() if until > now}
            self._not_before[replica] = now + RETRY_S
            logger.info("no channel to replica %s: %r", replica, error)
        finally:
            del self._opening[replica]
            if replica not in self._channels:
                channel.close()

    def opened(self, replica: str, channel: _Channel) -> None:
        """Called by a channel that its replica has accepted."""
        self._channels[replica] = channel

    def received(self, replica: str, items: list[ChannelItem]) -> None:
        """Called by a channel, for each message. Drops late replies from a replica that an attempt has left."""
        for number, batch in items:
            if isinstance(batch, ReplicaLoad):
                self._on_load(replica, batch)
                continue
            if (found := self._attempts.get(number)) is None:
                continue
            attempt, inbox = found
            sendings = attempt.sendings  # read first: the router may send the attempt elsewhere meanwhile
            if attempt.replica == replica:
                if attempt.begun is None:
                    attempt.begun = sendings
                inbox.put(batch)

    def broke(self, replica: str, channel: _Channel) -> None:
        """Called by an open channel whose connection has ended."""
        if self._channels.get(replica) is channel:
            del self._channels[replica]
            self._on_load(replica, None)
        for attempt, inbox in self._attempts.values():
            if attempt.replica == replica:
                inbox.lose(replica)


class _Channel(asyncio.Protocol):
    """One connection."""

    def __init__(self, reader: ChannelReader, replica: str, greeting: bytes) -> None:
        self._reader = reader
        self._replica = replica
        self._greeting = greeting
        self._frames = Frames()
        self._transport: asyncio.Transport | None = None
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the replica has accepted this ingress; ConnectionError when it has refused."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        self._transport = cast("asyncio.Transport", transport)
        keep_alive(transport)
        self._transport.write(self._greeting)

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        try:
            for items in self._frames.feed(data):
                if not self.opened.done():
                    self.opened.set_result(None)
                    self._reader.opened(self._replica, self)
                self._reader.received(self._replica, items)
        except MessageError:
            logger.exception("replica %s sent an invalid message", self._replica)
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio."""
        if self.opened.done() and not self.opened.cancelled():
            self._reader.broke(self._replica, self)
        elif not self.opened.done():
            self.opened.set_exception(ConnectionError("the replica closed it"))

    def close(self) -> None:
        """Abort the connection."""
        if self._transport is not None:
            self._transport.abort()
