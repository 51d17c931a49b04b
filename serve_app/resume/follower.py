"""The follower of a stream: takes in what its owner writes elsewhere, and takes over when that stops.

Knows no text, no HTTP and no store's kind.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from serve_app.core import Failure, MessageError, decode_replies
from serve_app.generation.output_tokens import BatchError, OtherTokens
from serve_app.resume.attendance import Attendance
from serve_app.resume.context import StreamContext
from serve_app.resume.feed import EventFeed
from serve_app.resume.journal_store import JournalView
from serve_app.resume.records import StreamDocument, write_document
from serve_app.resume.refusals import StreamChanged, StreamGone
from serve_app.resume.stream_id import loggable
from serve_app.resume.transcript import logprob_entries
from serve_app.resume.writer import OwnedJournal, new_owner

logger = logging.getLogger(__name__)

FOLLOW_WAIT_S = 10.0
"""How long a follower waits for news in one call to the store; a lapsed lease ends the wait at once."""
FED_AT_ONCE = 32
"""Tokens of a journal, and alternatives listed with them, that become events between two turns of the event loop: about
1 ms."""


class Follower:
    """Reads the journal of one stream into its feed."""

    def __init__(
        self,
        stream_id: str,
        document: StreamDocument,
        feed: EventFeed,
        context: StreamContext,
        take_place: Callable[[], bool],
        leave_place: Callable[[], None],
    ) -> None:
        """`take_place`: takes one of the places for streams that this process generates, if there is one."""
        self._id = stream_id
        self._document = document
        self._feed = feed
        self._context = context
        self._take_place = take_place
        self._leave_place = leave_place
        self.records: list[bytes] = []
        """The records that are in the feed; after this process owned the stream, those that it has written."""

    async def run(self, attendance: Attendance) -> OwnedJournal | None:
        """Follow the journal while there is a reader here, or to its end if it is generated without one.

        Returns the journal once its owner has stopped and this process has taken it over; None when the stream has
        finished or nobody reads here. Raises `StreamGone` and `StoreUnavailable`, as `StreamContext.look` does.
        """
        context, writer = self._context, self._context.writer
        while attendance.readers or self._document.background:
            view = await context.look(self._id, len(self.records), FOLLOW_WAIT_S)
            await self.feed(view)
            if self._feed.finished:
                break
            if view.leased:
                continue
            if not self._take_place():  # without an owner `look` does not wait
                await asyncio.sleep(context.settings.lease_s)
                continue
            owner = new_owner()
            if await context.reach(partial(context.store.acquire, self._id, owner)):
                # The old owner may have written between `look` and `acquire`.
                await self.feed(await context.look(self._id, len(self.records)))
                tokens = self._feed.transcript.tokens
                logger.warning("stream %s is continued here after %d tokens", loggable(self._id), tokens)
                # With the document, so that a journal that the store loses can be created again.
                journal = writer.own(self._id, owner, write_document(self._document), self.records)
                writer.keep(journal)
                return journal
            self._leave_place()
        return None

    async def feed(self, view: JournalView) -> None:
        """Take in the records of `view`, and let other tasks run meanwhile. Raises `StreamGone`."""
        fed = 0
        try:
            for record in view.records:
                self.records.append(record)
                for choice, reply in decode_replies(record):
                    if isinstance(reply, Failure):
                        self._feed.fail(reply)
                    else:
                        self._feed.push(choice, reply)
                        fed += logprob_entries(reply)
                    if fed >= FED_AT_ONCE:
                        fed = 0
                        await asyncio.sleep(0)
        except OtherTokens as error:
            logger.warning("stream %s was continued at another ingress with other tokens", loggable(self._id))
            raise StreamChanged from error
        except (MessageError, BatchError) as error:
            logger.error("the journal of stream %s can't be read", loggable(self._id), exc_info=error)
            raise StreamGone from error
        if view.finished and not self._feed.finished:
            if (await self._context.look(self._id, 0)).document:  # else it was erased
                logger.error("the journal of stream %s ends before the stream does", loggable(self._id))
            raise StreamGone
