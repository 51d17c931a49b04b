"""Owners, followers and takeovers, over ids: two or three ingresses on one store, in front of a fake replica."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, aclosing
from zlib import crc32

import pytest
from fake_replica import FakeReplica, counts, generation_request, resolved
from journal_stores import BrokenStore
from msgspec.structs import replace

from serve_app.core import Failure, FailureCode, FinishReason, TokenBatch, decode_replies, encode_replies
from serve_app.generation.attempt_history import FailoverSettings
from serve_app.generation.output_tokens import OutputTokens
from serve_app.resume import event_log
from serve_app.resume.context import ResumeSettings
from serve_app.resume.event_log import Mark
from serve_app.resume.journal_store import (
    Append,
    AppendResult,
    JournalLimits,
    JournalView,
    LeaseAction,
    LeaseStatus,
    StoreUnavailable,
)
from serve_app.resume.records import StreamDocument, write_document
from serve_app.resume.refusals import ReaderTooSlow, Refused, StreamChanged, StreamGone
from serve_app.resume.registry import ResumableStreams
from serve_app.resume.stream import ResumableStream
from serve_app.resume.transcript import Event

pytestmark = pytest.mark.usefixtures("exact_time")  # else a stall would end leases and streams

LEASE_S = 0.12
QUICK = {"lease_s": LEASE_S, "tick_s": 0.01, "settle_s": 0.2}
TOKENS = 40


class Sentences:
    """A transcript of one choice: one event a token, one for the end."""

    def __init__(self, document: StreamDocument) -> None:
        self._document = document
        self._output = OutputTokens(document.request.requests[0])
        self._digest = 0
        self.finished = False
        self.tokens = 0
        self.outcome = ""
        self.cached_prompt_tokens = 0

    def opening(self) -> list[Event]:
        return [Event(b"begin", 0)]

    def push(self, choice: int, batch: TokenBatch) -> list[Event]:
        known = len(self._output)
        self._output.append(batch)
        events = [self._event(b"%d" % token_id) for token_id in self._output.token_ids[known:]]
        if 666 in batch.token_ids:
            raise ZeroDivisionError("a bug")
        if batch.finish_reason is not None:
            self.finished = True
            self.outcome = batch.finish_reason
            events.append(self._event(batch.finish_reason.encode()))
        return events

    def fail(self, failure: Failure) -> list[Event]:
        self.finished = True
        return [self._event(failure.code.encode())]

    def _event(self, content: bytes) -> Event:
        self._digest = crc32(content, self._digest)
        return Event(content, self._digest)

    def again(self) -> Iterator[Event]:
        other = Sentences(self._document)
        yield from other.opening()
        while (position := len(other._output)) < len(self._output):
            yield from other.push(0, TokenBatch(position, (self._output.token_ids[position],)))
        if self.outcome:
            yield from other.push(0, TokenBatch(position, finish_reason=FinishReason(self.outcome)))

    def ended(self, choice: int) -> bool:
        return self.finished

    def output(self, choice: int) -> TokenBatch:
        return TokenBatch(0, tuple(self._output.token_ids))


EXPECTED = [b"begin", *(b"%d" % (100 + n) for n in range(TOKENS)), b"length"]


class Wire:
    """One ingress's connection to the store, which can be cut while others' work."""

    def __init__(self, store: BrokenStore) -> None:
        self.store = store
        self.cut = False

    async def create(self, stream_id: str, owner: str, document: bytes, tenant: str = "") -> object:
        self._check()
        return await self.store.create(stream_id, owner, document, tenant)

    async def append(self, appends: list[Append]) -> list[AppendResult]:
        self._check()
        return await self.store.append(appends)

    async def read(self, stream_id: str, position: int, wait_s: float = 0.0) -> JournalView | None:
        self._check()
        return await self.store.read(stream_id, position, wait_s)

    async def acquire(self, stream_id: str, owner: str) -> bool:
        self._check()
        return await self.store.acquire(stream_id, owner)

    async def aclose(self) -> None:
        """Nothing."""

    def _check(self) -> None:
        if self.cut:
            raise StoreUnavailable("the connection is cut")


@pytest.fixture
def store() -> BrokenStore:
    return BrokenStore(JournalLimits(lease_s=LEASE_S))


@pytest.fixture
def replica() -> FakeReplica:
    """40 tokens, one each 10 ms."""
    return FakeReplica([counts(TOKENS, pause_s=0.01)])


class Ingress:
    """What an ingress has."""

    def __init__(self, replica: FakeReplica, store: BrokenStore, settings: ResumeSettings) -> None:
        self.wire = Wire(store)
        self.streams = ResumableStreams(
            replica,
            self.wire,  # type: ignore[arg-type]
            settings,
            FailoverSettings(silence_s=1, first_backoff_s=0.001),
        )

    async def begin(self, **changes: object) -> ResumableStream:
        request = generation_request(**{"max_new_tokens": TOKENS, **changes})
        document = StreamDocument(resolved(request), "", "")
        stream = self.streams.new(self.streams.new_id(), document, Sentences(document))
        await stream.begin()
        return stream

    async def find(self, stream_id: str) -> ResumableStream:
        return await self.streams.find(stream_id, Sentences)

    async def rest(self, stream_id: str, start: int = 0, until: int | None = None) -> list[bytes]:
        """The events from `start` on, as a client of this ingress gets them."""
        return [content for content, _ in await self.rest_after(stream_id, Mark(start), until)]

    async def rest_after(self, stream_id: str, mark: Mark, until: int | None = None) -> list[Event]:
        """The events that come after those of which the client has the last one's mark."""
        stream = await self.find(stream_id)
        found: list[Event] = []
        with stream.attended():
            async with aclosing(stream.feed.read(mark, 10**6)) as pieces:
                async for first, events in pieces:
                    assert first == mark.position + len(found)
                    found += events
                    if until is not None and len(found) >= until:
                        break
        return found


MakeIngress = Callable[..., Ingress]


@pytest.fixture
async def make_ingress(replica: FakeReplica, store: BrokenStore) -> AsyncIterator[MakeIngress]:
    async with AsyncExitStack() as made:

        def make(**settings: float) -> Ingress:
            ingress = Ingress(replica, store, ResumeSettings(**{**QUICK, **settings}))  # type: ignore[arg-type]
            made.push_async_callback(ingress.streams.aclose)
            return ingress

        yield make


def die(ingress: Ingress) -> asyncio.Task[None]:
    """The process is killed: it generates no more, and says nothing to the store."""
    ingress.wire.cut = True
    return asyncio.create_task(ingress.streams.aclose())


async def test_another_ingress_takes_over_from_a_dead_one(
    make_ingress: MakeIngress, replica: FakeReplica, store: BrokenStore
) -> None:
    one, other = make_ingress(), make_ingress()
    stream = await one.begin(remaining_s=100.0)
    seen = await one.rest(stream.id, until=15)
    dying = die(one)
    rest = await other.rest(stream.id, len(seen))
    assert seen + rest == EXPECTED
    first, second = replica.requests
    assert len(second.output_token_ids) >= 5
    assert replace(second, output_token_ids=(), accepted=False, remaining_s=first.remaining_s) == first
    assert second.remaining_s is not None
    assert 99 < second.remaining_s < 100 - LEASE_S
    await dying
    assert await other.rest(stream.id) == EXPECTED
    assert len(replica.requests) == 2


class Cut:
    """A stream whose ingress died a moment after its connection to the store; another replica continues it."""

    def __init__(self, stream_id: str, written: int, seen: list[Event]) -> None:
        self.stream_id = stream_id
        self.written = written
        """Events of which all tokens are in the journal."""
        self.seen = seen
        """What a client at the dead ingress has."""


@pytest.fixture
async def cut(make_ingress: MakeIngress, replica: FakeReplica, store: BrokenStore) -> AsyncIterator[Cut]:
    one = make_ingress()
    stream = await one.begin()
    await one.rest(stream.id, until=8)
    one.wire.cut = True
    seen = await one.rest_after(stream.id, Mark(), until=16)
    dying = die(one)
    view = await store.read(stream.id, 0)
    assert view is not None
    written = 1 + max(batch.first_index + len(batch.token_ids) for r in view.records for _, batch in decode_replies(r))
    assert 8 <= written < len(seen) - 3
    yield Cut(stream.id, written, seen)
    await dying


def mark_of(events: list[Event]) -> Mark:
    return Mark(len(events), events[-1].digest)


async def test_two_texts_are_never_joined(make_ingress: MakeIngress, replica: FakeReplica, cut: Cut) -> None:
    """The tokens that nobody had written come out differently at another replica."""
    replica.scripts = [counts(TOKENS, ids=lambda n: 100 + n if n < cut.written - 1 else 500 + n)]
    other = make_ingress()
    for _ in range(2):
        with pytest.raises(StreamChanged):
            await other.rest_after(cut.stream_id, mark_of(cut.seen))
    rest = await other.rest_after(cut.stream_id, mark_of(cut.seen[: cut.written]))
    assert len(rest) == len(EXPECTED) - cut.written, "whoever has only what was written goes on"
    with pytest.raises(StreamChanged):
        await other.rest_after(cut.stream_id, mark_of(cut.seen[: cut.written + 1]))


async def test_a_text_that_ends_before_what_a_reader_has_is_another(
    make_ingress: MakeIngress, replica: FakeReplica, cut: Cut
) -> None:
    replica.scripts = [counts(cut.written)]
    other = make_ingress()
    for _ in range(2):
        with pytest.raises(StreamChanged):
            await other.rest_after(cut.stream_id, mark_of(cut.seen))
        stream = await other.find(cut.stream_id)
        with stream.attended(), pytest.raises(StreamChanged):
            await stream.feed.check(mark_of(cut.seen), 1)


async def test_the_same_tokens_again_are_the_same_text(make_ingress: MakeIngress, cut: Cut) -> None:
    rest = await make_ingress().rest_after(cut.stream_id, mark_of(cut.seen))
    assert [content for content, _ in cut.seen + rest] == EXPECTED


async def test_a_reader_is_told_before_anything_else_if_that_takes_no_longer_than_it_may_wait(
    make_ingress: MakeIngress, replica: FakeReplica, cut: Cut
) -> None:
    replica.scripts = [counts(TOKENS, pause_s=0.01, ids=lambda n: 100 + n if n < cut.written - 1 else 500 + n)]
    stream = await make_ingress().find(cut.stream_id)
    with stream.attended():
        await stream.feed.check(mark_of(cut.seen), 0.001)  # the lease of the dead has not even lapsed
        with pytest.raises(StreamChanged):
            await stream.feed.check(mark_of(cut.seen), 10 * LEASE_S)


async def test_an_owner_that_lost_its_lease_does_not_go_on_with_anothers_text(
    make_ingress: MakeIngress, replica: FakeReplica, store: BrokenStore
) -> None:
    replica.scripts = [counts(TOKENS, pause_s=0.01), counts(TOKENS, pause_s=0.01, ids=lambda n: 500 + n)]
    one, other = make_ingress(), make_ingress()
    stream = await one.begin()
    at_one = asyncio.create_task(one.rest(stream.id))
    await asyncio.sleep(0.05)
    one.wire.cut = True
    at_other = asyncio.create_task(other.rest(stream.id))
    while len(replica.requests) < 2:  # noqa: ASYNC110 - the other has taken over
        await asyncio.sleep(0.001)
    one.wire.cut = False
    with pytest.raises(StreamChanged):
        await at_one
    rest = await at_other
    assert await one.rest(stream.id) == rest, "who comes now gets what the journal has, here too"


@pytest.mark.parametrize("written", [0, 1, TOKENS - 1, TOKENS])
async def test_what_the_journal_lacks_is_generated_and_no_more(
    make_ingress: MakeIngress, replica: FakeReplica, store: BrokenStore, written: int
) -> None:
    """The owner died at any point, also between the last token and the end."""
    document = StreamDocument(resolved(generation_request(max_new_tokens=TOKENS)), "", "")
    stream_id = ResumableStreams.new_id()
    await store.create(stream_id, "dead", write_document(document))
    batch = TokenBatch(0, tuple(100 + n for n in range(written)))
    await store.append([Append(stream_id, "dead", 0, (encode_replies([(0, batch)]),), LeaseAction.RELEASE)])
    assert await make_ingress().rest(stream_id) == EXPECTED
    assert [len(request.output_token_ids) for request in replica.requests] == [written] * (written < TOKENS)


async def test_a_long_journal_is_taken_in_while_others_run(make_ingress: MakeIngress, store: BrokenStore) -> None:
    document = StreamDocument(resolved(generation_request(max_new_tokens=2000)), "", "")
    stream_id = ResumableStreams.new_id()
    await store.create(stream_id, "dead", write_document(document))
    replies = [(0, TokenBatch(n, (1000 + n,))) for n in range(1999)]
    replies.append((0, TokenBatch(1999, (2999,), finish_reason=FinishReason.LENGTH)))
    await store.append([Append(stream_id, "dead", 0, (encode_replies(replies),), LeaseAction.FINISH)])
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    running = asyncio.create_task(others())
    stream = await make_ingress().find(stream_id)
    running.cancel()
    assert stream.finished
    assert len(stream.feed.events) == 2002
    assert turns > 2000 / 50


async def test_many_who_find_a_stream_at_once_find_the_same(make_ingress: MakeIngress, replica: FakeReplica) -> None:
    one, other = make_ingress(), make_ingress()
    stream = await one.begin()
    await one.rest(stream.id, until=30)
    answers = await asyncio.gather(*(other.rest(stream.id) for _ in range(10)))
    assert answers == [EXPECTED] * 10
    assert len(replica.requests) == 1


async def test_all_readers_of_a_finished_stream_share_what_was_made_of_its_journal(make_ingress: MakeIngress) -> None:
    one, other = make_ingress(), make_ingress()
    stream = await one.begin()
    await one.rest(stream.id)
    await stream.closed()
    found = await asyncio.gather(*(other.find(stream.id) for _ in range(10)))
    assert len({id(each) for each in [*found, await other.find(stream.id)]}) == 1
    del found
    await asyncio.sleep(0)  # the loop lets go of the tasks that found it
    gc.collect()
    assert other.streams._context.memory.kept_bytes == 0, "nothing is held for nobody"


async def test_a_reader_elsewhere_follows_the_owner_and_keeps_it_going(
    make_ingress: MakeIngress, replica: FakeReplica
) -> None:
    one, other = make_ingress(grace_s=0.15), make_ingress()
    stream = await one.begin()
    assert await one.rest(stream.id, until=5)
    assert await other.rest(stream.id, 3) == EXPECTED[3:]
    assert len(replica.requests) == 1


async def test_an_owner_that_lost_its_lease_follows_the_new_one(
    make_ingress: MakeIngress, replica: FakeReplica, store: BrokenStore
) -> None:
    one, other = make_ingress(), make_ingress()
    stream = await one.begin()
    at_one = asyncio.create_task(one.rest(stream.id))
    await asyncio.sleep(0.05)
    one.wire.cut = True
    at_other = asyncio.create_task(other.rest(stream.id))
    while len(replica.requests) < 2:  # noqa: ASYNC110 - the other has taken over
        await asyncio.sleep(0.001)
    one.wire.cut = False
    assert await at_one == EXPECTED
    assert await at_other == EXPECTED
    assert len(replica.requests) == 2
    assert replica.cancelled >= 1


async def test_a_released_stream_is_taken_up_at_once(make_ingress: MakeIngress, replica: FakeReplica) -> None:
    one, other = make_ingress(), make_ingress()
    stream = await one.begin()
    seen = await one.rest(stream.id, until=5)
    await one.streams.aclose()
    assert len(one.streams) == 0
    started = asyncio.get_running_loop().time()
    rest = await other.rest(stream.id, len(seen), until=1)
    assert asyncio.get_running_loop().time() - started < LEASE_S
    assert seen + rest == EXPECTED[: len(seen) + len(rest)]


async def test_nothing_is_left_when_streams_have_ended(
    make_ingress: MakeIngress, replica: FakeReplica, store: BrokenStore
) -> None:
    one, other = make_ingress(grace_s=0.05), make_ingress(grace_s=0.05)
    finished, left = await one.begin(), await one.begin()
    assert await one.rest(finished.id) == EXPECTED
    await one.rest(left.id, until=3)
    await other.rest(left.id, until=3)
    while len(one.streams) or len(other.streams):  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    assert replica.closed == len(replica.requests)
    names = {"stream", "journal", "generation"}
    while any(task.get_name().split()[0] in names for task in asyncio.all_tasks()):  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    view = await store.read(left.id, 0)
    assert view is not None
    assert not view.leased


async def test_a_stream_whose_journal_is_lost_while_it_is_followed(
    make_ingress: MakeIngress, store: BrokenStore
) -> None:
    one, other = make_ingress(), make_ingress()
    stream = await one.begin()
    following = asyncio.create_task(other.rest(stream.id))
    await asyncio.sleep(0.05)
    dying = die(one)
    store.forget_all()
    with pytest.raises(StreamGone):
        await following
    with pytest.raises(StreamGone):
        await other.find(stream.id)
    await dying


async def test_a_store_that_fails_while_it_is_followed(make_ingress: MakeIngress) -> None:
    one, other = make_ingress(), make_ingress()
    stream = await one.begin()
    following = asyncio.create_task(other.rest(stream.id))
    await asyncio.sleep(0.05)
    other.wire.cut = True
    with pytest.raises(StoreUnavailable):
        await following
    other.wire.cut = False
    assert await other.rest(stream.id) == EXPECTED


async def test_a_journal_that_outgrows_the_store(make_ingress: MakeIngress, store: BrokenStore) -> None:
    one, other = make_ingress(grace_s=0.05), make_ingress()
    stream = await one.begin()
    seen = await one.rest(stream.id, until=5)
    store.journals.limits = dataclasses.replace(store.journals.limits, max_bytes=store.journals.size_bytes)
    assert seen + await one.rest(stream.id, len(seen)) == EXPECTED  # here it goes on
    with pytest.raises(StreamGone):
        await other.find(stream.id)
    second = await asyncio.wait_for(one.begin(), 1)
    assert second.id != stream.id


async def test_lost_answers_add_nothing_twice(make_ingress: MakeIngress, store: BrokenStore) -> None:
    one, other = make_ingress(), make_ingress()
    stream = await one.begin()
    reading = asyncio.create_task(one.rest(stream.id))
    for _ in range(8):
        store.forgets_answers = not store.forgets_answers
        await asyncio.sleep(0.02)
    assert await reading == EXPECTED
    assert await other.rest(stream.id) == EXPECTED


async def test_grace_counts_from_acceptance(make_ingress: MakeIngress, replica: FakeReplica) -> None:
    replica.scripts = [lambda request: [0.1, *counts(TOKENS)(request)]]
    stream = await make_ingress(grace_s=0.001).begin()
    assert stream.id


async def test_a_refused_stream_says_why_and_leaves_nothing(
    make_ingress: MakeIngress, replica: FakeReplica, store: BrokenStore
) -> None:
    replica.scripts = [lambda request: [Failure(FailureCode.OVERLOADED, "Full.")]]
    one = make_ingress()
    with pytest.raises(Refused, match="Full"):
        await one.begin()
    while len(one.streams) or len(store.journals):  # noqa: ASYNC110
        await asyncio.sleep(0.001)


async def test_a_client_that_leaves_while_it_is_refused_leaves_no_journal(
    make_ingress: MakeIngress, replica: FakeReplica, store: BrokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store is slower than the refusal, so the stream's task waits for the journal that it is to drop."""
    created = asyncio.Event()

    async def create_late(*arguments: str) -> LeaseStatus:
        await created.wait()
        return await store.create(*arguments)  # type: ignore[arg-type]

    replica.scripts = [lambda request: [Failure(FailureCode.OVERLOADED, "Full.")]]
    one = make_ingress()
    monkeypatch.setattr(one.wire, "create", create_late)
    begun = asyncio.create_task(one.begin())
    while not any(stream._accepted.done() for stream in one.streams._streams.values()):  # noqa: ASYNC110
        await asyncio.sleep(0)
    begun.cancel()
    await asyncio.wait({begun})
    assert begun.cancelled()
    created.set()
    await asyncio.sleep(LEASE_S)
    assert len(one.streams) == len(store.journals) == 0


async def test_a_bug_ends_the_stream_with_an_error(
    make_ingress: MakeIngress, replica: FakeReplica, caplog: pytest.LogCaptureFixture
) -> None:
    replica.scripts = [counts(TOKENS, ids=lambda n: 666 if n == 9 else 100 + n)]
    one, other = make_ingress(), make_ingress()
    stream = await one.begin()
    with stream.attended():
        while not stream.finished:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    assert stream.feed.events.piece(len(stream.feed.events) - 1, 1)[0].content == b"engine_failed"
    assert any(record.exc_info for record in caplog.records)
    await stream.closed()
    with pytest.raises(ZeroDivisionError):  # whoever reads it meets the bug again
        await other.find(stream.id)


async def test_a_reader_that_lags_is_told(make_ingress: MakeIngress) -> None:
    one = make_ingress()
    stream = await one.begin()
    with stream.attended():
        async with aclosing(stream.feed.read(Mark(), max_lag_bytes=12)) as pieces:
            await anext(pieces)
            await anext(pieces)
            await asyncio.sleep(0.1)
            with pytest.raises(ReaderTooSlow):
                await anext(pieces)
        assert (await anext(stream.feed.read(Mark(), max_lag_bytes=12)))[0] == 0  # from the start nobody lags


async def test_a_task_is_named_by_the_beginning_of_its_streams_id(make_ingress: MakeIngress) -> None:
    """asyncio logs the names of tasks whose errors nobody fetches."""
    stream = await make_ingress().begin()
    names = [task.get_name() for task in asyncio.all_tasks()]
    assert f"stream {stream.id[:8]}…" in names
    assert not any(stream.id in name for name in names)


async def test_what_is_no_longer_kept_is_made_again(make_ingress: MakeIngress, monkeypatch: pytest.MonkeyPatch) -> None:
    """For readers at any place of a stream that goes on, and of one that has ended."""
    monkeypatch.setattr(event_log, "NEWEST_BYTES", 9)
    one = make_ingress(max_event_bytes=100, max_stream_event_bytes=30)
    streams = [await one.begin() for _ in range(5)]
    most_bytes = 0

    async def watch() -> None:
        nonlocal most_bytes
        while True:
            most_bytes = max(most_bytes, one.streams._context.memory.kept_bytes)
            await asyncio.sleep(0.001)

    watching = asyncio.create_task(watch())
    answers = await asyncio.gather(*(one.rest(stream.id) for stream in streams))
    assert answers == [EXPECTED] * 5
    assert all(stream.feed.events.kept_bytes <= 30 for stream in streams)
    later = await one.begin()
    await one.rest(later.id, until=20)
    assert later.feed.events.first > 5
    answers = await asyncio.gather(*(one.rest(later.id, start) for start in (0, 3, 15, 25)))
    assert answers == [EXPECTED[start:] for start in (0, 3, 15, 25)]
    again = await make_ingress(max_stream_event_bytes=10).rest(later.id)
    assert again == EXPECTED
    watching.cancel()
    assert 30 < most_bytes <= 100


async def test_a_journal_that_can_not_be_written_takes_no_memory(make_ingress: MakeIngress, store: BrokenStore) -> None:
    one = make_ingress()
    stream = await one.begin()
    await one.rest(stream.id, until=5)
    store.journals.limits = dataclasses.replace(store.journals.limits, max_bytes=store.journals.size_bytes)
    await one.rest(stream.id, until=20)
    assert stream._owner is not None
    journal = stream._owner.journal
    assert journal.lease is LeaseStatus.FULL
    assert (journal._unwritten, journal._records) == ([], [])


async def test_ids_can_not_be_guessed() -> None:
    ids = {ResumableStreams.new_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert {len(stream_id) for stream_id in ids} == {22}


@pytest.mark.parametrize("seed", range(40))
async def test_whatever_happens_a_client_that_comes_back_has_it_all(
    make_ingress: MakeIngress, replica: FakeReplica, store: BrokenStore, seed: int
) -> None:
    """Clients that hop between three ingresses whose connections to the store come and go; the first one dies."""
    chance = random.Random(seed)
    replica.scripts = [counts(TOKENS, pause_s=0.004)]
    ingresses = [make_ingress(grace_s=chance.choice([0.01, 0.2])) for _ in range(3)]
    alive = list(ingresses)
    streams = [await ingresses[0].begin() for _ in range(4)]

    async def client(stream_id: str) -> list[bytes]:
        seen = [Event(b"begin", 0)]
        while seen[-1].content != b"length":
            try:
                at = chance.choice(alive)
                seen += await at.rest_after(stream_id, mark_of(seen), until=chance.randrange(1, 20))
            except StoreUnavailable:
                await asyncio.sleep(0.01)
        return [content for content, _ in seen]

    async def trouble() -> None:
        for step in range(15):
            if step == 5:
                alive.pop(0)
                await die(ingresses[0])
            chance.choice(alive).wire.cut = chance.random() < 0.4
            await asyncio.sleep(0.02)
        for ingress in alive:
            ingress.wire.cut = False

    async with asyncio.timeout(20):
        *answers, _ = await asyncio.gather(*(client(stream.id) for stream in streams), trouble())
    assert answers == [EXPECTED] * 4
