"""Streams that outlive their client's connection and their ingress (P2 in docs/design.md).

One owner generates a stream, and any ingress can read it. Promises that event k is the same wherever it is read: at the
owner, at another ingress that follows the journal, or at one that took it over. A stream that nobody reads stops after
a grace period, and can be taken up again until its journal expires. Knows no text, no HTTP and no kind of store.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import Context

from serve_app.core import RequestError
from serve_app.resume.attendance import Attendance
from serve_app.resume.context import StreamContext
from serve_app.resume.feed import EventFeed
from serve_app.resume.follower import Follower
from serve_app.resume.journal_store import JournalView, LeaseAction, LeaseStatus, StoreUnavailable
from serve_app.resume.owner import Owner
from serve_app.resume.records import StreamDocument, write_document
from serve_app.resume.refusals import JournalsFull, Refused, StreamGone, TooManyInBackground
from serve_app.resume.stream_id import loggable
from serve_app.resume.transcript import Transcript
from serve_app.resume.writer import OwnedJournal, new_owner


class ResumableStream:
    """One stream at one ingress: a feed, and the task that fills it as the stream's owner or its follower."""

    def __init__(
        self,
        stream_id: str,
        document: StreamDocument,
        transcript: Transcript,
        context: StreamContext,
        running: dict[str, ResumableStream],
    ) -> None:
        """`running`: the streams for which this process runs a task. This stream adds and removes itself."""
        self.id = stream_id
        self.document = document
        self.feed = EventFeed(transcript, context.memory)
        self._attendance = Attendance(context.settings.grace_s, self._judge)
        self._follower = Follower(stream_id, document, self.feed, context, self._take_place, self._leave_place)
        self._context = context
        self._running = running
        self._owner: Owner | None = None
        """Set while this process generates the stream."""
        self._has_place = False
        """This process generates the stream, or is about to."""
        self._task: asyncio.Task[None] | None = None
        self._creation: asyncio.Task[None] | None = None
        loop = asyncio.get_running_loop()
        self._began_at = loop.time()
        self._accepted: asyncio.Future[None] = loop.create_future()
        """Done once a replica has accepted the stream; already done for a stream from the store."""
        self._dropped = False
        """The stream was refused, or `begin` failed or was cancelled: the journal is to be dropped."""

        self._erased = False

    @property
    def finished(self) -> bool:
        """All events are there."""
        return self.feed.finished

    @contextmanager
    def attended(self) -> Iterator[None]:
        """Count a reader for as long as the block runs. Read the `feed` only within it."""
        try:
            with self._attendance.attended():
                yield
        finally:
            self._limit_unattended()

    async def begin(self) -> None:
        """Start generating a new stream. Returns when a replica has accepted it and the journal is there.

        Raises `Refused`, `JournalsFull`, `TooManyInBackground` and `StoreUnavailable`, and leaves nothing behind then.
        """
        if not self._take_place():
            raise TooManyInBackground(self._context.settings.max_background)
        writer = self._context.writer
        tenant = self.document.request.requests[0].tenant
        journal = writer.own(self.id, new_owner(), write_document(self.document), tenant=tenant)
        # The store creates the journal during the model's first step, which takes longer.
        self._creation = asyncio.create_task(writer.create(journal), name="journal creation")
        self._start(journal)
        try:
            await self._acceptance()
            await asyncio.wait({self._creation})
            self._creation.result()
            if journal.lease not in (LeaseStatus.HELD, LeaseStatus.GONE):  # gone: it is being created again
                raise JournalsFull
        except BaseException as error:
            self._dropped = True
            if not isinstance(error, Refused):  # after `Refused` the task ends by itself
                self._stop()
            raise

    async def _acceptance(self) -> None:
        """Wait for a replica to accept the stream; raises `Refused`. One that goes on without a reader may wait for a
        replica after its `begin`."""
        if self.document.background:
            await asyncio.wait({self._accepted}, timeout=self._context.settings.refusal_s)
            if not self._accepted.done():
                self._accept()
                if self._owner is not None:
                    self._owner.accepted = True
        await self._accepted

    def ask_to_stop(self) -> None:
        """End the stream at once if this process generates it. The caller tells the store too."""
        if self._owner is not None:
            self._owner.ask_to_stop()

    def lose(self) -> None:
        """Stop generating: the store has deleted the journal."""
        self._erased = True
        if self._owner is not None:
            self._owner.lose()

    async def discard(self) -> None:
        """End a stream that nobody knows of, and drop its journal."""
        self._dropped = True
        await self.aclose()

    async def catch_up(self, view: JournalView) -> None:
        """Take in the journal of a stream that was found in the store. Raises `StreamGone` when it can't be read."""
        self._accepted.set_result(None)
        self._began_at = asyncio.get_running_loop().time() - view.age_s
        await self._follower.feed(view)

    def follow(self) -> None:
        """After `catch_up`: get the rest of the stream."""
        if self.finished:
            self.feed.close()
        else:
            self._start(None)

    @property
    def in_background(self) -> bool:
        """This process generates it, and goes on without a reader."""
        return self._has_place and self.document.background

    def _take_place(self) -> bool:
        """Take one of the places of this process for streams that it generates; False: all are taken.

        Only streams that go on without a reader are limited in number.
        """
        in_background = sum(stream.in_background for stream in self._running.values())
        self._has_place = not self.document.background or in_background < self._context.settings.max_background
        return self._has_place

    def _leave_place(self) -> None:
        self._has_place = False

    def used_tokens(self, most: int) -> int:
        """Tokens that the stream has used, once `closed`; its request may use at most so many.

        All of them, if it stopped before its end and can be taken up again: what comes then is paid already.
        """
        transcript = self.feed.transcript
        if self._task is not None and not (self.finished or self._dropped or self._erased):
            return most
        return self.document.request.prompt_tokens + transcript.tokens if transcript.tokens else 0

    async def closed(self) -> None:
        """Wait until this process does nothing more for the stream."""
        if self._task is not None:
            await asyncio.wait({self._task})

    async def aclose(self) -> None:
        """Stop at once; another ingress may take the stream over."""
        self._stop()
        await self.closed()

    def _stop(self) -> None:
        """Make the task end. One that has ended its stream and writes that to the journal ends by itself: were it
        cancelled, a journal that is still being created would be kept for ever."""
        if self._task is not None and not self.feed.closed:
            self._task.cancel()

    def _start(self, journal: OwnedJournal | None) -> None:
        self._running[self.id] = self
        # A context of its own: Serve cancels all that was called in the context of a request when its client goes.
        name = f"stream {loggable(self.id)}"
        self._task = asyncio.create_task(self._run(journal), name=name, context=Context())

    async def _run(self, journal: OwnedJournal | None) -> None:
        """The task: owner or follower in turn, until the end, or until nobody reads."""
        trouble: RequestError | None = None
        try:
            while not self.finished:
                journal = journal or await self._follower.run(self._attendance)
                if journal is None or not await self._own(journal):
                    break
                journal = journal if journal.lease is not LeaseStatus.LOST else None
        except Refused as refused:
            self._dropped = True
            if not self._accepted.done():
                self._accepted.set_exception(refused)
        except (StreamGone, StoreUnavailable) as gone:
            trouble = gone
        finally:
            await self._end(journal, trouble)

    async def _own(self, journal: OwnedJournal) -> bool:
        """Be the owner while that is possible. Returns whether to go on as owner or follower. Raises `Refused`."""
        self._owner = owner = Owner(
            self._context,
            self.document,
            self.feed,
            self._attendance,
            journal,
            began_at=self._began_at,
            accepted=self._accepted.done(),
            on_accepted=self._accept,
        )
        try:
            await owner.run()
            return owner.wanted or journal.lease is LeaseStatus.LOST
        finally:
            self._owner = None
            self._leave_place()
            self._follower.records = journal.written_records

    async def _end(self, journal: OwnedJournal | None, trouble: RequestError | None) -> None:
        self.feed.close(trouble)
        if not self._accepted.done():
            self._accepted.cancel()
        try:
            if journal is not None and await self._is_created(journal):
                last = LeaseAction.FINISH if self.finished else LeaseAction.RELEASE
                action = LeaseAction.DROP if self._dropped else last
                await self._context.writer.end(journal, action, self._context.settings.settle_s)
        finally:
            if self._running.get(self.id) is self:  # another object for the stream may have come meanwhile
                del self._running[self.id]

    async def _is_created(self, journal: OwnedJournal) -> bool:
        """Wait for the journal's creation. Returns whether the store has the journal, or is to get it again."""
        if self._creation is None:  # the journal was found in the store
            return True
        await asyncio.wait({self._creation})
        failed = self._creation.cancelled() or self._creation.exception() is not None
        return not failed and journal.lease is not LeaseStatus.FULL

    def _limit_unattended(self) -> None:
        """Above `max_unattended` generated streams without a reader, stop those that have had none for longest."""
        generated = (stream for stream in self._running.values() if stream._owner is not None)
        owned = (stream._attendance for stream in generated if not stream.document.background)
        unread = [attendance for attendance in owned if not attendance.readers]
        unread.sort(key=lambda attendance: attendance.left_at)
        for attendance in unread[: max(0, len(unread) - self._context.settings.max_unattended)]:
            attendance.give_up()

    def _accept(self) -> None:
        if not self._accepted.done():
            self._accepted.set_result(None)

    def _judge(self) -> None:
        if self._owner is not None:
            self._owner.judge()
