"""A stream that is followed, or looked for, outlives a store that is away for a moment or has lost its journals."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing

import pytest
from fake_replica import ALIVE, FakeReplica, counts, generation_request, resolved
from journal_stores import BrokenStore

from serve_app.core import Failure, SamplingParams, TokenBatch
from serve_app.generation.output_tokens import OutputTokens
from serve_app.resume.context import ResumeSettings
from serve_app.resume.event_log import Mark
from serve_app.resume.journal_store import JournalLimits, LeaseStatus, StoreUnavailable
from serve_app.resume.records import StreamDocument
from serve_app.resume.refusals import JournalsFull, StreamGone
from serve_app.resume.registry import ResumableStreams
from serve_app.resume.stream import ResumableStream
from serve_app.resume.transcript import Event

pytestmark = pytest.mark.usefixtures("exact_time")

LEASE_S, SETTLE_S, GONE_S = 0.2, 1.0, 0.4
TOKENS = 60
EXPECTED = [*(b"%d" % (100 + n) for n in range(TOKENS)), b"length"]


class Ids:
    """A transcript: one event a token, one for the end."""

    def __init__(self, document: StreamDocument) -> None:
        self._output = OutputTokens(document.request.requests[0])
        self.finished = False
        self.tokens = 0
        self.outcome = ""
        self.cached_prompt_tokens = 0

    def opening(self) -> list[Event]:
        return []

    def push(self, choice: int, batch: TokenBatch) -> list[Event]:
        known = len(self._output)
        self._output.append(batch)
        events = [Event(b"%d" % token_id, token_id) for token_id in self._output.token_ids[known:]]
        self.finished = batch.finish_reason is not None
        return [*events, Event(batch.finish_reason.encode(), 1)] if batch.finish_reason is not None else events

    def fail(self, failure: Failure) -> list[Event]:
        self.finished = True
        return [Event(failure.code.encode(), 2)]

    def ended(self, choice: int) -> bool:
        return self.finished

    def output(self, choice: int) -> TokenBatch:
        return TokenBatch(0, tuple(self._output.token_ids))


@pytest.fixture
def store() -> BrokenStore:
    return BrokenStore(JournalLimits(lease_s=LEASE_S))


@pytest.fixture
def replica() -> FakeReplica:
    """60 tokens, one each 20 ms."""
    return FakeReplica([counts(TOKENS, pause_s=0.02)])


MakeStreams = Callable[[], ResumableStreams]


@pytest.fixture
async def make_streams(replica: FakeReplica, store: BrokenStore) -> AsyncIterator[MakeStreams]:
    async with AsyncExitStack() as made:

        def make() -> ResumableStreams:
            settings = ResumeSettings(lease_s=LEASE_S, tick_s=0.01, settle_s=SETTLE_S, gone_s=GONE_S)
            streams = ResumableStreams(replica, store, settings)
            made.push_async_callback(streams.aclose)
            return streams

        yield make


def new(streams: ResumableStreams) -> ResumableStream:
    document = StreamDocument(resolved(generation_request(max_new_tokens=TOKENS)), "", "")
    return streams.new(streams.new_id(), document, Ids(document))


async def begun(streams: ResumableStreams) -> ResumableStream:
    stream = new(streams)
    await stream.begin()
    return stream


async def rest(streams: ResumableStreams, stream_id: str) -> list[bytes]:
    stream = await streams.find(stream_id, Ids)
    with stream.attended():
        async with aclosing(stream.feed.read(Mark(), 10**6)) as pieces:
            return [content async for _, events in pieces for content, _ in events]


async def following(streams: ResumableStreams, stream_id: str) -> asyncio.Task[list[bytes]]:
    """A reader at another ingress than the owner's, who has some of it."""
    reading = asyncio.create_task(rest(streams, stream_id))
    await asyncio.sleep(0.3)
    assert not reading.done()
    return reading


async def test_a_follower_waits_for_a_store_that_is_away(
    make_streams: MakeStreams, store: BrokenStore, replica: FakeReplica
) -> None:
    owner, other = make_streams(), make_streams()
    stream = await begun(owner)
    reading = await following(other, stream.id)
    store.down = True
    await asyncio.sleep(0.8 * SETTLE_S)
    assert not reading.done()
    store.down = False
    assert await reading == EXPECTED
    assert len(replica.requests) == 1


async def test_a_follower_waits_for_a_journal_that_is_written_again(
    make_streams: MakeStreams, store: BrokenStore, replica: FakeReplica
) -> None:
    owner, other = make_streams(), make_streams()
    stream = await begun(owner)
    reading = await following(other, stream.id)
    store.forget_all()
    assert await reading == EXPECTED
    assert len(replica.requests) == 1


async def test_so_does_whoever_comes_just_then(make_streams: MakeStreams, store: BrokenStore) -> None:
    owner = make_streams()
    stream = await begun(owner)
    await asyncio.sleep(0.1)
    store.down = True
    store.forget_all()
    finding = asyncio.create_task(rest(make_streams(), stream.id))
    await asyncio.sleep(0.2)
    assert not finding.done()
    store.down = False
    assert await finding == EXPECTED


async def test_neither_waits_for_ever(make_streams: MakeStreams, store: BrokenStore) -> None:
    owner, other = make_streams(), make_streams()
    stream = await begun(owner)
    reading = await following(other, stream.id)
    loop = asyncio.get_running_loop()
    store.down, down_at = True, loop.time()
    with pytest.raises(StoreUnavailable):
        await reading
    assert SETTLE_S <= loop.time() - down_at < SETTLE_S + LEASE_S
    with pytest.raises(StoreUnavailable):
        await make_streams().find(stream.id, Ids)
    store.down, up_at = False, loop.time()
    with pytest.raises(StreamGone):
        await make_streams().find(ResumableStreams.new_id(), Ids)
    assert GONE_S <= loop.time() - up_at < GONE_S + LEASE_S


async def test_a_journal_that_is_away_while_its_stream_begins_is_not_a_full_store(
    make_streams: MakeStreams, store: BrokenStore, replica: FakeReplica
) -> None:
    """The store was restarted between the creation and the first token; the owner is about to write it again."""
    replica.scripts = [lambda request: [0.03, ALIVE, *counts(TOKENS, pause_s=0.02)(request)]]
    stream = new(make_streams())
    beginning = asyncio.create_task(stream.begin())
    await asyncio.sleep(0.02)
    assert stream._owner is not None
    stream._owner.journal.lease = LeaseStatus.GONE
    await beginning
    assert await rest(make_streams(), stream.id) == EXPECTED


async def test_a_long_journal_is_read_in_turns(make_streams: MakeStreams) -> None:
    """100 alternatives a token are 6,000 entries."""
    streams, turns = make_streams(), 0
    request = generation_request(max_new_tokens=TOKENS, sampling=SamplingParams(seed=7, logprobs=100))
    document = StreamDocument(resolved(request), "", "")
    stream = streams.new(streams.new_id(), document, Ids(document))
    await stream.begin()
    assert await rest(streams, stream.id) == EXPECTED
    await stream.closed()

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    for read in (streams.stored(stream.id), streams.find(stream.id, Ids)):
        turns = 0
        await read
        assert turns >= 5
    counting.cancel()


async def test_a_full_store_is_one(make_streams: MakeStreams, store: BrokenStore) -> None:
    store.journals.limits = JournalLimits(max_journals=0, lease_s=LEASE_S)
    with pytest.raises(JournalsFull):
        await begun(make_streams())


async def test_an_object_that_ends_leaves_another_of_the_same_stream(make_streams: MakeStreams) -> None:
    streams = make_streams()
    stream = await begun(streams)
    later = new(streams)
    streams._streams[stream.id] = later
    await stream.aclose()
    assert streams._streams == {stream.id: later}
