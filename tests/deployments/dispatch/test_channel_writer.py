"""One message for all tokens of a step, to the right caller, over a connection that only an ingress can have."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from fake_replica import generation_request
from msgspec.structs import replace
from tiny_models import until

from serve_app.core import (
    Failure,
    FailureCode,
    FinishReason,
    GenerationStats,
    ReplicaLoad,
    Reply,
    TokenBatch,
    decode_news,
)
from serve_app.deployments.dispatch import channel_writer as token_channels
from serve_app.deployments.dispatch.channel_wire import LOAD, ChannelAddress, ChannelItem, greeting
from serve_app.deployments.dispatch.channel_writer import TokenChannels, send

Connect = Callable[..., Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


def put(channels: TokenChannels, attempt: int, reply: Reply, ingress_id: str = "me") -> bool:
    """Whether there was a channel to put it into."""
    channel = channels.of(ingress_id)
    return channel is not None and channel.put(attempt, reply)


async def sent(
    channels: TokenChannels, *replies: Reply, before: Callable[[int], None] = lambda number: None
) -> list[Reply]:
    """What of an attempt's replies goes by Serve's call; `before(k)` happens before the k-th."""
    request = generation_request(ingress_id="me", attempt=7)

    async def made() -> AsyncIterator[Reply]:
        for number, reply in enumerate(replies):
            before(number)
            yield reply

    return [reply async for reply in send(request, made(), channels)]


@pytest.fixture
async def channels() -> AsyncIterator[TokenChannels]:
    made = TokenChannels()
    await made.listen("127.0.0.1")
    yield made
    assert made._server is not None
    made._server.close()


@pytest.fixture
async def connect(channels: TokenChannels) -> AsyncIterator[Connect]:
    """Makes a connection that says `line`, by default what `ingress_id` has to say."""
    writers: list[asyncio.StreamWriter] = []

    async def make(
        ingress_id: str = "me", line: bytes | None = None
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        assert channels.address is not None
        reader, writer = await asyncio.open_connection(channels.address.host, channels.address.port)
        writers.append(writer)
        writer.write(greeting(channels.address, ingress_id) if line is None else line)
        return reader, writer

    yield make
    for writer in writers:
        writer.transport.abort()


async def message(reader: asyncio.StreamReader) -> list[ChannelItem]:
    """The next one from the channel."""
    length = int.from_bytes(await reader.readexactly(4), "big")
    return decode_news(await reader.readexactly(length))


async def opened(connect: Connect, ingress_id: str = "me") -> asyncio.StreamReader:
    reader, _ = await connect(ingress_id)
    assert await message(reader) == []
    return reader


async def gone(reader: asyncio.StreamReader) -> bool:
    """Waits for the end of a connection; whether nothing came before."""
    try:
        return await reader.read() == b""
    except ConnectionResetError:
        return True


async def test_what_the_streams_of_a_step_put_in_one_after_the_other_is_one_message(
    channels: TokenChannels, connect: Connect
) -> None:
    reader, woken = await opened(connect), asyncio.Event()

    async def stream(attempt: int) -> None:
        await woken.wait()
        assert put(channels, attempt, TokenBatch(4, (attempt,)))

    async with asyncio.TaskGroup() as tasks:
        for attempt in (1, 2, 3):
            tasks.create_task(stream(attempt))
        await asyncio.sleep(0)
        woken.set()
    assert await message(reader) == [(attempt, TokenBatch(4, (attempt,))) for attempt in (1, 2, 3)]
    assert channels.messages == 1


async def test_counters_come_along(channels: TokenChannels, connect: Connect) -> None:
    reader = await opened(connect)
    first = TokenBatch(0, (5,), stats=GenerationStats(cached_prompt_tokens=3, numerics_id="x"))
    assert put(channels, 1, first)
    assert await message(reader) == [(1, first)]


FIRST, LAST = TokenBatch(0, (1,)), TokenBatch(1, (2,), finish_reason=FinishReason.STOP)
FULL = Failure(FailureCode.OVERLOADED, "full")


@pytest.mark.parametrize("replies", [(FIRST, LAST), (FULL,)])
async def test_an_attempt_goes_through_the_channel_with_its_last_word(
    channels: TokenChannels, connect: Connect, replies: tuple[Reply, ...]
) -> None:
    reader = await opened(connect)
    assert await sent(channels, *replies) == []
    assert await message(reader) == [(7, reply) for reply in replies]


async def test_an_attempt_that_has_begun_by_its_call_stays_there(channels: TokenChannels, connect: Connect) -> None:
    """Also when a channel is opened meanwhile: its tokens must not overtake those that are on their way."""
    await opened(connect, "later")

    def a_channel_comes(number: int) -> None:
        if number == 1:
            channels._open["me"] = channels._open["later"]

    assert await sent(channels, FIRST, LAST, before=a_channel_comes) == [FIRST, LAST]


async def test_an_attempt_ends_with_its_channel(channels: TokenChannels, connect: Connect) -> None:
    await opened(connect)

    def it_breaks(number: int) -> None:
        if number == 1:
            channels._open["me"].close()

    assert await sent(channels, FIRST, TokenBatch(1, (5,)), LAST, before=it_breaks) == []


async def test_an_attempt_whose_ingress_has_gone_ends(channels: TokenChannels) -> None:
    async def made() -> AsyncIterator[Reply]:
        yield FIRST
        raise AssertionError("nobody wants more")

    request = generation_request(ingress_id="me")
    assert [reply async for reply in send(request, made(), channels, lambda ingress_id: ingress_id == "me")] == []


async def test_a_channel_is_of_one_ingress_only(channels: TokenChannels, connect: Connect) -> None:
    assert not put(channels, 1, TokenBatch(0, (1,)))
    _, writer = await connect("another")
    await opened(connect, "a third")
    assert not put(channels, 1, TokenBatch(0, (1,)))
    assert put(channels, 1, TokenBatch(0, (1,)), "another")
    writer.transport.abort()
    await until(lambda: not put(channels, 1, TokenBatch(0, (1,)), "another"))


async def test_nothing_is_put_into_a_channel_that_has_ended(channels: TokenChannels, connect: Connect) -> None:
    await opened(connect)
    assert put(channels, 1, TokenBatch(0, (1,)))
    await asyncio.sleep(0)
    channels._open["me"].close()  # its end is told in the loop's next turn
    assert not put(channels, 1, TokenBatch(1, (2,)))
    assert channels._open


async def test_a_later_channel_of_the_same_caller_takes_the_place_of_the_first(
    channels: TokenChannels, connect: Connect
) -> None:
    first, second = await opened(connect), await opened(connect)
    assert await gone(first)
    assert put(channels, 1, TokenBatch(0, (1,)))
    assert await message(second) == [(1, TokenBatch(0, (1,)))]


@pytest.mark.parametrize("line", [b"GET / HTTP/1.1\r\n\r\n", b"a-guess me\n", b"x" * 2000])
async def test_strangers_get_nothing(channels: TokenChannels, connect: Connect, line: bytes) -> None:
    reader, _ = await connect(line=line)
    assert await gone(reader)
    assert not put(channels, 1, TokenBatch(0, (1,)))


async def test_one_that_says_nothing_is_closed(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_channels, "GREETING_S", 0.01)
    reader, _ = await connect(line=b"a")
    assert await gone(reader)


async def test_one_that_says_more_than_it_has_to_is_closed(channels: TokenChannels, connect: Connect) -> None:
    reader, writer = await connect()
    assert await message(reader) == []
    writer.write(b"\n")
    assert await gone(reader)
    assert not put(channels, 1, TokenBatch(0, (1,)))


async def test_a_reader_that_has_stopped_loses_its_channel_and_nobody_the_memory(
    channels: TokenChannels, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_channels, "MAX_UNREAD_BYTES", 100_000)
    _, writer = await connect()
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    await opened(connect, "another")
    batch = TokenBatch(0, tuple(range(10_000)))
    await until(lambda: not put(channels, 1, batch))
    assert put(channels, 1, batch, "another")


async def test_an_address_that_is_not_of_this_machine_is_done_without() -> None:
    channels = TokenChannels()
    await channels.listen("192.0.2.254")  # of RFC 5737, for documentation
    assert channels.address is None


async def test_each_replica_has_a_secret_of_its_own(channels: TokenChannels, connect: Connect) -> None:
    other = TokenChannels()
    await other.listen("127.0.0.1")
    assert other.address is not None
    assert channels.address is not None
    mistaken = ChannelAddress("127.0.0.1", channels.address.port, other.address.secret)
    reader, _ = await connect(line=greeting(mistaken, "me"))
    assert await gone(reader)
    assert other._server is not None
    other._server.close()


async def test_a_connection_whose_other_machine_vanishes_ends(channels: TokenChannels, connect: Connect) -> None:
    await opened(connect)
    connection = channels._open["me"]._transport.get_extra_info("socket")
    assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


LOAD_NOW = ReplicaLoad(3, 1, 4, 1024, 77, 12.5, 0.25)


async def test_the_load_goes_with_the_tokens_of_its_step_and_alone_to_those_who_get_none(
    channels: TokenChannels, connect: Connect
) -> None:
    mine, another = await opened(connect), await opened(connect, "another")
    woken = asyncio.Event()

    async def stream() -> None:
        await woken.wait()
        put(channels, 1, TokenBatch(0, (5,)))

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(stream())
        await asyncio.sleep(0)
        channels.tell(LOAD_NOW)
        woken.set()
    assert await message(mine) == [(1, TokenBatch(0, (5,))), (LOAD, LOAD_NOW)]
    assert await message(another) == [(LOAD, LOAD_NOW)]
    assert channels.messages == 2


async def test_a_channel_that_opens_brings_the_load_and_only_the_latest(
    channels: TokenChannels, connect: Connect
) -> None:
    channels.tell(replace(LOAD_NOW, running=1))
    channels.tell(LOAD_NOW)
    reader = await opened(connect)
    assert await message(reader) == [(LOAD, LOAD_NOW)]
    channels.tell(replace(LOAD_NOW, running=1))
    channels.tell(replace(LOAD_NOW, running=2))
    assert await message(reader) == [(LOAD, replace(LOAD_NOW, running=2))]
    channels._open["me"].close()
    channels.tell(LOAD_NOW)
