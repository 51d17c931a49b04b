"""A channel to each replica that is known; who may have lost something when it breaks is told."""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack

import pytest
from fake_replica import generation_request
from msgspec.structs import replace

from serve_app.core import ReplicaLoad, TokenBatch
from serve_app.deployments.dispatch import channel_reader
from serve_app.deployments.dispatch.channel_reader import ChannelReader
from serve_app.deployments.dispatch.channel_wire import LOAD, ChannelAddress, ChannelItem, encode, read_greeting
from serve_app.deployments.dispatch.directory import Attempt
from serve_app.deployments.dispatch.inbox import Inbox


class Replica:
    """The other end, as a test wants it to be."""

    def __init__(self, secret: str) -> None:
        self.callers: list[str | None] = []
        self.connections: asyncio.Queue[asyncio.StreamWriter] = asyncio.Queue()
        self.address: ChannelAddress | None = None
        self._secret = secret
        self._answer = encode(())

    async def start(self, answer: bytes | None = None) -> None:
        """`answer`: to a greeting; by default that the channel is open."""
        if answer is not None:
            self._answer = answer
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = ChannelAddress("127.0.0.1", self._server.sockets[0].getsockname()[1], self._secret)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.callers.append(read_greeting(await reader.readline(), self._secret))
        writer.write(self._answer)
        self.connections.put_nowait(writer)

    def stop(self) -> None:
        self._server.close()


class Channels:
    """A reader, two replicas that it may connect to, and attempts that last as long as the test."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._numbers = itertools.count(1)
        self.replicas = {"a": Replica("secret-of-a"), "b": Replica("secret-of-b")}
        self.loads: asyncio.Queue[tuple[str, ReplicaLoad | None]] = asyncio.Queue()
        self.reader = ChannelReader(
            lambda name: self.replicas[name].address, "me", lambda name, load: self.loads.put_nowait((name, load))
        )

    def send(self, replica: str, first_index: int = 0) -> tuple[int, Inbox]:
        """An attempt that is at this replica, which has not answered; its number and inbox."""
        number = next(self._numbers)
        attempt = Attempt(replace(generation_request(), attempt=number, output_token_ids=tuple(range(first_index))))
        attempt.replica = replica
        return number, self._stack.enter_context(self.reader.inbox(attempt))

    def connect(self, replica: str, first_index: int = 0) -> tuple[int, Inbox]:
        """The same, and there is to be a channel."""
        sent = self.send(replica, first_index)
        self.reader.connect([replica])
        return sent

    async def open(self, replica: str) -> asyncio.StreamWriter:
        """The replica's side of the channel that is open, or about to be."""
        async with asyncio.timeout(5):
            writer = await self.replicas[replica].connections.get()
            await until_done(self.reader._opening.get(replica))
        assert replica in self.reader._channels
        return writer


async def until_done(task: asyncio.Task[None] | None) -> None:
    if task is not None:
        await asyncio.wait({task}, timeout=5)
        assert task.done()


async def told(*inboxes: Inbox) -> list[bool]:
    """Of each, whether it is lost. Waits for the first to be."""
    assert await inboxes[0].take(5) is None
    return [bool(inbox.broken) for inbox in inboxes]


@pytest.fixture
async def channels() -> AsyncIterator[Channels]:
    with ExitStack() as stack:
        made = Channels(stack)
        for replica in made.replicas.values():
            await replica.start()
        yield made
        for name, replica in made.replicas.items():
            made.reader.drop(name)
            replica.stop()
        await asyncio.sleep(0)


async def test_a_replica_gets_one_channel(channels: Channels) -> None:
    channels.connect("a")
    channels.connect("a")
    channels.send("b")
    await channels.open("a")
    channels.connect("a")
    assert channels.replicas["a"].callers == ["me"]
    assert channels.replicas["b"].callers == []
    assert set(channels.reader._channels) == {"a"}
    assert not channels.reader._opening


async def test_a_caller_without_a_name_and_a_replica_without_an_address_have_none(channels: Channels) -> None:
    ChannelReader(lambda name: channels.replicas[name].address, "").connect(["a"])
    channels.replicas["b"].address = None
    channels.connect("b")
    channels.connect("a")
    await channels.open("a")
    assert channels.replicas["a"].callers == ["me"]
    assert channels.replicas["b"].callers == []


async def test_each_item_comes_to_its_attempt_and_one_that_is_over_is_no_trouble(channels: Channels) -> None:
    first, its = channels.connect("a", first_index=2)
    second, others = channels.connect("a")
    writer = await channels.open("a")
    items: list[ChannelItem] = [(second, TokenBatch(0, (9,))), (77, TokenBatch(0, (1,))), (first, TokenBatch(2, (5,)))]
    writer.write(encode(items))
    assert await its.take(5) == TokenBatch(2, (5,))
    assert await others.take(5) == TokenBatch(0, (9,))


async def test_a_message_may_come_in_pieces_and_several_at_once(channels: Channels) -> None:
    number, inbox = channels.connect("a")
    await channels.open("a")
    batches = [TokenBatch(index, (100 + index,)) for index in range(9)]
    sent = b"".join(encode([(number, batch)]) for batch in batches)
    cuts = [0, 1, 30, 31, len(sent) - 1, len(sent)]
    for begin, end in itertools.pairwise(cuts):
        channels.reader._channels["a"].data_received(sent[begin:end])
    assert [await inbox.take(5) for _ in batches] == batches


@pytest.mark.parametrize("aborts", [False, True])
async def test_when_it_breaks_the_attempts_of_its_replica_are_lost_and_no_others(
    channels: Channels, aborts: bool
) -> None:
    _, elsewhere = channels.connect("b")
    _, lost = channels.connect("a")
    _, unheard = channels.send("a")
    writer = await channels.open("a")
    await channels.open("b")
    if aborts:
        writer.transport.abort()
    else:
        writer.close()
    assert await told(lost, unheard, elsewhere) == [True, True, False]
    assert set(channels.reader._channels) == {"b"}
    channels.connect("a")
    await channels.open("a")


async def test_what_is_no_message_breaks_it(channels: Channels) -> None:
    for garbage in (b"\x00\x00\x00\x01\x07", b"\x00\x00\x00\x03\x91\x91\x01", b"nonsense\n"):
        _, inbox = channels.connect("a")
        writer = await channels.open("a")
        writer.write(garbage)
        assert await told(inbox) == [True]


async def test_that_of_a_replica_that_fell_silent_is_dropped(channels: Channels) -> None:
    _, inbox = channels.connect("a")
    await channels.open("a")
    channels.reader.drop("a")
    channels.reader.drop("b")
    assert await told(inbox) == [True]


@pytest.mark.parametrize("answer", [b"nonsense\n", None])
async def test_one_that_could_not_be_opened_costs_nobody_and_is_not_tried_again_at_once(
    channels: Channels, monkeypatch: pytest.MonkeyPatch, answer: bytes | None
) -> None:
    refuses = channels.replicas["a"]
    refuses.stop()
    if answer is not None:
        await refuses.start(answer)
    inboxes = [channels.connect("a")[1] for _ in range(2)]
    for _ in range(3):
        await until_done(channels.reader._opening.get("a"))
        channels.connect("a")
    assert len(refuses.callers) == (answer is not None)
    assert not any(inbox.broken for inbox in inboxes)
    assert channels.reader._channels == {}
    refuses.stop()
    await refuses.start(encode(()))
    while not refuses.connections.empty():
        refuses.connections.get_nowait()
    monkeypatch.setattr(channels.reader, "_not_before", {"a": 0.0})
    channels.connect("a")
    await channels.open("a")


async def test_one_that_does_not_open_in_time_is_given_up(channels: Channels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_reader, "OPEN_S", 0.01)
    channels.replicas["a"].stop()
    await channels.replicas["a"].start(b"")
    inboxes = [channels.connect("a")[1] for _ in range(2)]
    await until_done(channels.reader._opening["a"])
    assert channels.reader._channels == {}
    assert not any(inbox.broken for inbox in inboxes)


async def test_a_channel_whose_replicas_machine_vanishes_ends(channels: Channels) -> None:
    channels.connect("a")
    await channels.open("a")
    transport = channels.reader._channels["a"]._transport
    assert transport is not None
    assert transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


async def test_what_comes_late_of_where_an_attempt_was_before_is_nothing_to_it(channels: Channels) -> None:
    number, inbox = channels.connect("a")
    channels.reader.received("b", [(number, TokenBatch(0, (9,)))])
    channels.reader.received("a", [(number, TokenBatch(0, (5,)))])
    assert await inbox.take(5) == TokenBatch(0, (5,))


async def test_the_owner_hears_of_each_replicas_load_until_its_channel_is_gone(channels: Channels) -> None:
    number, inbox = channels.connect("a")
    channels.connect("b")
    writer = await channels.open("a")
    await channels.open("b")
    load = ReplicaLoad(3, 1, 4, 1024, 77, 12.5, 0.25)
    writer.write(encode([(number, TokenBatch(0, (5,))), (LOAD, load)]))
    assert await channels.loads.get() == ("a", load)
    assert await inbox.take(5) == TokenBatch(0, (5,))
    writer.close()
    assert await channels.loads.get() == ("a", None)
    assert channels.loads.empty(), "the other replica's channel is open"
