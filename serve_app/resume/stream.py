"""Streams that outlive their client's connection, and their ingress: one owner generates, anybody may read (P2).

Promises that event k of a stream is the same wherever it is read: at its owner, at another ingress that follows the
journal, or at one that took it over. A stream that nobody reads stops after a grace period, and can be taken up again
until its journal expires. Knows no text, no HTTP and no store's kind.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing, contextmanager
from contextvars import Context
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

from serve_app.core import Failure, FailureCode, TokenBatch
from serve_app.generation.attempts import FailoverSettings, Generation, interleave
from serve_app.generation.output_tokens import JournalError, OtherTokens
from serve_app.generation.replica import ReplicaClient
from serve_app.resume.event_log import EventLog, EventMemory, Mark, Replay
from serve_app.resume.journal_store import Hold, JournalStore, JournalView, StoreUnavailable, Then
from serve_app.resume.records import (
    RecordError,
    StreamDocument,
    read_record,
    write_document,
    write_reply,
)
from serve_app.resume.stream_id import loggable
from serve_app.resume.transcript import Event, Transcript
from serve_app.resume.writer import TICK_S, JournalWriter, OwnedJournal

logger = logging.getLogger(__name__)

FOLLOW_WAIT_S = 10.0
"""How long a follower waits for news in one call to the store; a lapsed lease ends the wait at once."""
FED_AT_ONCE = 32
"""Tokens of a journal that become events between two turns of the event loop: about 1 ms."""
PIECE_BYTES = 2**16
"""A reader gets about so much at a time: a long answer from the start goes out in pieces."""
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0
"""Between two calls to a store that can't be reached."""

_Answer = TypeVar("_Answer")


class Refused(Exception):
    """A new stream ended before a replica had accepted it."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


class JournalsFull(Exception):
    """The store has no room for another stream."""


class StreamGone(Exception):
    """There is no such stream: it never was, it has expired, or its journal was lost."""


class StreamChanged(StreamGone):
    """What a reader has is not how the stream begins: what came after its last record was computed again, otherwise."""


class ReaderTooSlow(Exception):
    """A reader is too far behind what is there for it."""


@dataclass(frozen=True, slots=True)
class ResumeSettings:
    """How long streams live without a reader, and how many."""

    grace_s: float = 30.0
    """A stream goes on this long after its last reader went."""
    max_unattended: int = 64
    """Streams without a reader that one process goes on with; of more, those longest without one stop."""
    settle_s: float = 5.0
    """How long a store that can't be reached is waited for, by a stream's last words and by those who follow one."""
    gone_s: float = 4.0
    """How long a journal must be away before its stream is gone. A store that was restarted lacks those of streams that
    go on, and their owners write them again: within a lease, or when the actor that keeps them has started, which takes
    1 to 3 s on the 2-core machine."""
    lease_s: float = 1.0
    """The store's."""
    tick_s: float = TICK_S
    max_event_bytes: int = 64 * 2**20
    """Of the events of all streams that one process keeps; what a reader needs beyond that is made again."""
    max_stream_event_bytes: int = 4 * 2**20
    """Of one stream."""


@dataclass(slots=True)
class Home:
    """What all streams of a process share."""

    client: ReplicaClient
    failover: FailoverSettings
    store: JournalStore
    writer: JournalWriter
    settings: ResumeSettings
    memory: EventMemory
    streams: dict[str, ResumableStream] = field(default_factory=dict)
    """Those that this process generates or follows."""

    async def look(self, stream_id: str, position: int, wait_s: float = 0.0) -> JournalView:
        """See `JournalStore.read`. Raises `StreamGone` when the journal stays away, and `StoreUnavailable`."""
        loop, deadline = asyncio.get_running_loop(), None
        while (view := await self.reach(partial(self.store.read, stream_id, position, wait_s))) is None:
            deadline = deadline or loop.time() + self.settings.gone_s
            left_s = deadline - loop.time()
            if left_s <= 0:
                raise StreamGone
            await asyncio.sleep(min(left_s, self.settings.lease_s / 4))
        return view

    async def reach(self, call: Callable[[], Awaitable[_Answer]]) -> _Answer:
        """The store's answer to `call`, which may be repeated. Raises `StoreUnavailable` after `settle_s` without one.

        A store that fails over, or an actor that starts again, is there a moment later: no stream should end for that.
        """
        loop = asyncio.get_running_loop()
        deadline, pause_s = loop.time() + self.settings.settle_s, _FIRST_PAUSE_S
        while True:
            try:
                return await call()
            except StoreUnavailable:
                left_s = deadline - loop.time()
                if left_s <= 0:
                    raise
            await asyncio.sleep(min(left_s, pause_s * random.uniform(0.5, 1.5)))
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


class ResumableStream:
    """One stream at one ingress: its events so far, and the task that gets more of them."""

    def __init__(self, stream_id: str, document: StreamDocument, transcript: Transcript, home: Home) -> None:
        self.id = stream_id
        self.document = document
        self.events = EventLog(home.memory)
        self.events.append(transcript.opening())
        self._transcript = transcript
        self._home = home
        self._readers = 0
        self._records: list[bytes] = []
        self._created = self._left_at = asyncio.get_running_loop().time()
        self._accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._news = asyncio.Event()
        self._creation: asyncio.Task[None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._journal: OwnedJournal | None = None
        self._patience: asyncio.Timeout | None = None
        self._given_up = False
        self._dropped = False
        self._over = False
        self._trouble: StreamGone | StoreUnavailable | None = None

    @property
    def finished(self) -> bool:
        """All events are there."""
        return self._transcript.finished

    @property
    def tokens(self) -> int:
        """See `Transcript`."""
        return self._transcript.tokens

    @property
    def outcome(self) -> str:
        """See `Transcript`."""
        return self._transcript.outcome

    @property
    def cached_prompt_tokens(self) -> int:
        """See `Transcript`."""
        return self._transcript.cached_prompt_tokens

    @property
    def lives(self) -> bool:
        """All events are there, or a task gets more of them."""
        return not self._over or self.finished

    @property
    def unattended_since(self) -> float | None:
        """When the last reader here went, if this process generates for nobody."""
        return self._left_at if self._journal is not None and not self._readers else None

    @contextmanager
    def attended(self) -> Iterator[None]:
        """A reader is here for as long as the block runs."""
        self._readers += 1
        self._given_up = False
        self._judge()
        try:
            yield
        finally:
            self._readers -= 1
            self._left_at = asyncio.get_running_loop().time()
            self._judge()
            _limit_unattended(self._home)

    async def check(self, mark: Mark, wait_s: float) -> None:
        """Raise `StreamChanged` unless the reader's events are how this stream begins.

        A reader may have more than this process knows yet. It waits for that, at most `wait_s`; `read` looks again.
        """
        try:
            async with asyncio.timeout(wait_s):
                while mark.digest is not None and len(self.events) < mark.position and not self._over:
                    await self._news.wait()
        except TimeoutError:
            return
        ends_before = self.finished and mark.digest is not None and mark.position > len(self.events)
        if ends_before or self.events.differs(mark):
            raise StreamChanged

    async def read(self, mark: Mark, max_lag_bytes: int) -> AsyncGenerator[tuple[int, list[Event]], None]:
        """(index of the first, events) from the reader's mark on, as they come. To be used inside `attended`.

        Raises `StreamChanged` when the reader's events turn out to be of another text, `StreamGone` and
        `StoreUnavailable` when no more can be known here, and `ReaderTooSlow` for a reader that was up to date once and
        is now more than `max_lag_bytes` behind, apart from what came all at once then.
        """
        position, caught_up, at_once_bytes = mark.position, False, 0
        replay: Replay | None = None
        while True:
            news = self._news
            if position < len(self.events):
                if position == mark.position:
                    await self.check(mark, 0)
                if caught_up and self.events.bytes_after(position) > max_lag_bytes + at_once_bytes:
                    raise ReaderTooSlow
                if position >= self.events.first:
                    replay, events = None, self.events.piece(position, PIECE_BYTES)
                else:
                    replay = replay or Replay(self._transcript.again())
                    events = await replay.piece(position, PIECE_BYTES)
                yield position, events
                position += len(events)
            elif self._over:
                if self._trouble is not None:
                    raise self._trouble
                await self.check(mark, 0)
                return
            else:
                caught_up, replay = True, None
                await news.wait()
                # A reader may know more than this process does yet.
                at_once_bytes = self.events.bytes_after(position)

    async def begin(self) -> None:
        """A new stream: generate it. Returns when a replica has accepted it and the journal is there.

        Raises `Refused`, `JournalsFull` and `StoreUnavailable`, and leaves nothing behind then.
        """
        journal = self._home.writer.own(self.id, self._home.writer.new_owner(), write_document(self.document))
        self._home.streams[self.id] = self
        # Beside the first step of the model, which takes longer.
        self._creation = asyncio.create_task(self._home.writer.create(journal), name="journal creation")
        self._task = self._start(journal)
        try:
            await self._accepted
            await asyncio.wait({self._creation})
            self._creation.result()
            if journal.hold not in (Hold.HELD, Hold.GONE):  # gone: it is being created again
                raise JournalsFull
        except BaseException:
            self._dropped = True
            if self._is_accepted or self._accepted.cancelled():
                self._task.cancel()  # refused, it ends by itself
            raise

    async def catch_up(self, view: JournalView) -> None:
        """A stream that was found in the store: take in what is there. Raises `StreamGone` when it can't be read."""
        self._accepted.set_result(None)
        self._created = asyncio.get_running_loop().time() - view.age_s
        await self._feed(view)

    def follow(self) -> None:
        """It has caught up: get the rest of it."""
        if self.finished:
            self._over = True
            return
        self._home.streams[self.id] = self
        self._task = self._start(None)

    @property
    def _is_accepted(self) -> bool:
        done = self._accepted.done() and not self._accepted.cancelled()
        return done and self._accepted.exception() is None

    def give_up(self) -> None:
        """Stop generating as soon as nobody reads."""
        self._given_up = True
        self._judge()

    async def closed(self) -> None:
        """Wait until this process does nothing more for the stream."""
        if self._task is not None:
            await asyncio.wait({self._task})

    async def aclose(self) -> None:
        """Stop at once; another ingress may take the stream over."""
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task})

    def _start(self, journal: OwnedJournal | None) -> asyncio.Task[None]:
        # A context of its own: Serve cancels all that was called in the context of a request when its client goes.
        return asyncio.create_task(self._run(journal), name=f"stream {loggable(self.id)}", context=Context())

    async def _run(self, journal: OwnedJournal | None) -> None:
        """The task: owner or follower, until the end, or until nobody reads."""
        try:
            while not self.finished:
                if journal is not None:
                    await self._own(journal)
                    journal = journal if journal.hold is not Hold.LOST else None
                    if not self._readers and self._patience_s(journal) <= 0:
                        break
                else:
                    journal = await self._follow()
                    if journal is None:
                        break
        except Refused as refused:
            self._dropped = True
            if not self._accepted.done():
                self._accepted.set_exception(refused)
        except (StreamGone, StoreUnavailable) as trouble:
            self._trouble = trouble
        finally:
            self._over = True
            self._tell()
            if not self._accepted.done():
                self._accepted.cancel()
            try:
                await self._part(journal)
            finally:
                if self._home.streams.get(self.id) is self:  # another object for it may have come meanwhile
                    del self._home.streams[self.id]

    async def _part(self, journal: OwnedJournal | None) -> None:
        """Write what is left to be written, and leave the journal to others."""
        if journal is None:
            return
        if self._creation is not None:
            await asyncio.wait({self._creation})
            if self._creation.cancelled() or self._creation.exception() or journal.hold is Hold.FULL:
                return
        journal.end(Then.DROP if self._dropped else Then.FINISH if self.finished else Then.RELEASE)
        try:
            async with asyncio.timeout(self._home.settings.settle_s):
                await journal.settled()
        except TimeoutError:
            logger.warning("the end of stream %s could not be written to its journal", loggable(self.id))
        finally:
            self._home.writer.forget(journal)

    async def _own(self, journal: OwnedJournal) -> None:
        """Generate until the end, until nobody wants it, or until another owner has it. Raises `Refused`."""
        self._journal = journal
        self._records = []
        journal.on_news = self._judge
        try:
            async with asyncio.timeout(None) as self._patience:
                self._judge()
                await self._generate(journal)
        except TimeoutError:
            if self._patience is None or not self._patience.expired():
                raise
        except Refused:
            raise
        except Exception:
            request_id = self.document.requests[0].request_id
            logger.exception("request %s failed in the middle of its stream", request_id)
            message = f"The server made a mistake. Its log has the details of request {request_id}."
            failure = Failure(FailureCode.ENGINE_FAILED, message)
            if not self._is_accepted:
                raise Refused(failure) from None
            self._fail(journal, failure)
        finally:
            self._patience = journal.on_news = self._journal = None
            self._records = journal.written_records

    async def _generate(self, journal: OwnedJournal) -> None:
        changed = asyncio.Event()
        choices = [choice for choice in range(len(self.document.requests)) if not self._transcript.ended(choice)]
        async with AsyncExitStack() as running:
            generations = [await running.enter_async_context(self._generation(choice, changed)) for choice in choices]
            replies = await running.enter_async_context(aclosing(interleave(generations, changed)))
            async for place, reply in replies:
                if isinstance(reply, Failure):
                    if not self._is_accepted:
                        raise Refused(reply)
                    self._fail(journal, reply)
                    return
                if not self._accepted.done():
                    self._accepted.set_result(None)
                    self._left_at = asyncio.get_running_loop().time()
                    self._judge()
                if reply.token_ids or reply.finish_reason is not None:
                    journal.write(write_reply(choices[place], reply))
                    self._push(choices[place], reply)
                if self._transcript.ended(choices[place]):
                    await generations[place].aclose()  # by a stop string: the model would go on

    def _generation(self, choice: int, changed: asyncio.Event) -> Generation:
        request = self.document.requests[choice]
        if request.remaining_s is not None:
            age_s = asyncio.get_running_loop().time() - self._created
            request = replace(request, remaining_s=max(0.0, request.remaining_s - age_s))
        prior = self._transcript.output(choice) if self._is_accepted else None
        return Generation(self._home.client, request, changed, self._home.failover, prior)

    async def _follow(self) -> OwnedJournal | None:
        """Read what the owner writes; take over when it stops. None: it has finished, or nobody reads here.

        Raises `StreamGone` and `StoreUnavailable` when that lasts.
        """
        home, writer = self._home, self._home.writer
        while self._readers:
            await self._feed(await home.look(self.id, len(self._records), FOLLOW_WAIT_S))
            owner = writer.new_owner()
            if not self.finished and await home.reach(partial(home.store.acquire, self.id, owner)):
                # The old owner may have written between the two, and the document is needed to write it again.
                await self._feed(await home.look(self.id, len(self._records)))
                logger.warning("stream %s is continued here after %d tokens", loggable(self.id), self.tokens)
                journal = writer.own(self.id, owner, write_document(self.document), self._records)
                writer.keep(journal)
                return journal
            if self.finished:
                break
        return None

    async def _feed(self, view: JournalView) -> None:
        """Take in records; others run meanwhile. Raises `StreamGone`."""
        fed = 0
        try:
            for record in view.records:
                self._records.append(record)
                for choice, reply in read_record(record):
                    if isinstance(reply, Failure):
                        self._add(self._transcript.fail(reply))
                    else:
                        self._push(choice, reply)
                        fed += len(reply.token_ids)
                    if fed >= FED_AT_ONCE:
                        fed = 0
                        await asyncio.sleep(0)
        except OtherTokens as error:
            logger.warning("stream %s was continued elsewhere with other tokens", loggable(self.id))
            raise StreamChanged from error
        except (RecordError, JournalError) as error:
            logger.error("the journal of stream %s can't be read", loggable(self.id), exc_info=error)
            raise StreamGone from error
        if view.finished and not self.finished:
            logger.error("the journal of stream %s ends before the stream does", loggable(self.id))
            raise StreamGone

    def _push(self, choice: int, batch: TokenBatch) -> None:
        if not self.finished:
            self._add(self._transcript.push(choice, batch))

    def _fail(self, journal: OwnedJournal, failure: Failure) -> None:
        journal.write(write_reply(0, failure))
        self._add(self._transcript.fail(failure))

    def _add(self, events: Sequence[Event]) -> None:
        self.events.append(events)
        self._tell()

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    def _judge(self) -> None:
        """Stop generating when another owner has the journal, or once nobody has wanted the stream for long."""
        journal, patience = self._journal, self._patience
        if journal is None or patience is None or patience.expired():
            return
        now = asyncio.get_running_loop().time()
        if journal.hold is Hold.LOST:
            patience.reschedule(now)
        else:
            waited_for = self._readers or not self._accepted.done()  # whoever begins it waits until it is accepted
            patience.reschedule(None if waited_for else now + self._patience_s(journal))

    def _patience_s(self, journal: OwnedJournal | None) -> float:
        """How much longer to go on without a reader here."""
        if self._given_up:
            return 0.0
        last_read = self._left_at
        if journal is not None and journal.last_read is not None:
            last_read = max(last_read, journal.last_read)  # somebody reads at another ingress
        return last_read + self._home.settings.grace_s - asyncio.get_running_loop().time()


def _limit_unattended(home: Home) -> None:
    """Stop those streams that have been without a reader longest, beyond the limit."""
    left = [(since, stream) for stream in home.streams.values() if (since := stream.unattended_since) is not None]
    left.sort(key=lambda item: item[0])
    for _, stream in left[: max(0, len(left) - home.settings.max_unattended)]:
        stream.give_up()
