"""The owner of a stream: generates it, writes its journal, and stops when nobody wants it or another has the lease.

Knows no text and no HTTP.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field

from msgspec.structs import replace

from serve_app.core import Failure, FailureCode, TokenBatch
from serve_app.generation.attempts import Generations
from serve_app.resume.attendance import Attendance
from serve_app.resume.context import StreamContext
from serve_app.resume.feed import EventFeed
from serve_app.resume.journal_store import LeaseStatus
from serve_app.resume.records import StreamDocument
from serve_app.resume.refusals import Refused
from serve_app.resume.writer import OwnedJournal

logger = logging.getLogger(__name__)

CANCELLED = Failure(FailureCode.CANCELLED, "It was cancelled.")
"""How a stream ends whose caller wants no more of it."""


@dataclass(eq=False)
class Owner:
    """Holds the lease of one stream's journal, and runs the generations whose output the journal gets."""

    context: StreamContext
    document: StreamDocument
    feed: EventFeed
    attendance: Attendance
    journal: OwnedJournal
    began_at: float
    """When the stream began, by the loop's clock."""
    accepted: bool
    """A replica has accepted the stream."""
    on_accepted: Callable[[], None]
    _patience: asyncio.Timeout | None = field(default=None, init=False)

    async def run(self) -> None:
        """Generate until the stream ends, nobody wants it, or another owner has the journal. Raises `Refused`."""
        self.journal.on_news = self.judge
        try:
            async with asyncio.timeout(None) as self._patience:
                self.judge()
                await self._generate()
        except TimeoutError:
            if self._patience is None or not self._patience.expired():
                raise
            if self.journal.stop_asked and self.journal.lease is not LeaseStatus.LOST:
                self._accept()
                self._fail(CANCELLED)
        except Refused:
            raise
        except Exception:
            request_id = self.document.request.request_id
            logger.exception("request %s failed in the middle of its stream", request_id)
            message = f"Internal error. The server's log has the details of request {request_id}."
            failure = Failure(FailureCode.ENGINE_FAILED, message)
            if not self.accepted:
                raise Refused.of(failure) from None
            self._fail(failure)
        finally:
            self._patience = self.journal.on_news = None

    @property
    def wanted(self) -> bool:
        """Somebody reads the stream, or did so a moment ago, or it goes on without a reader.

        A stream whose journal was dropped can't be found again, so it does not go on without a reader.
        """
        if self.attendance.readers:
            return True
        if self.document.background:
            return self.journal.lease is not LeaseStatus.FULL
        return self.attendance.patience_s(self.journal.last_read) > 0

    def ask_to_stop(self) -> None:
        """End the stream now, as if the store had told so."""
        self.journal.stop_asked = True
        self.judge()

    def lose(self) -> None:
        """Stop now, as if the store had told that another owner has the journal."""
        self.journal.lease = LeaseStatus.LOST
        self.judge()

    def judge(self) -> None:
        """Stop generating when another owner has the journal, when the stream is to end, or once nobody has wanted it
        for long."""
        patience = self._patience
        if patience is None or patience.expired():
            return
        now = asyncio.get_running_loop().time()
        if self.journal.lease is LeaseStatus.LOST or self.journal.stop_asked:
            patience.reschedule(now)
        elif self.attendance.readers or not self.accepted:
            patience.reschedule(None)  # until it is accepted, a request waits for it
        elif self.document.background:
            patience.reschedule(None if self.wanted else now)
        else:
            patience.reschedule(now + self.attendance.patience_s(self.journal.last_read))

    async def _generate(self) -> None:
        transcript = self.feed.transcript
        generations = Generations(self.context.client, self.context.failover)
        age_s = asyncio.get_running_loop().time() - self.began_at
        for request in self.document.request.requests:
            if not transcript.ended(request.choice):
                if request.remaining_s is not None:
                    request = replace(request, remaining_s=max(0.0, request.remaining_s - age_s))
                generations.add(request, transcript.output(request.choice) if self.accepted else None)
        async with generations, aclosing(generations.replies()) as replies:
            async for choice, reply in replies:
                if isinstance(reply, Failure):
                    if not self.accepted:
                        raise Refused.of(reply)
                    self._fail(reply)
                    return
                self._accept()
                self.feed.recoveries_s = generations.recoveries_s
                self._take(choice, reply)
                if transcript.ended(choice):
                    await generations.stop(choice)  # a stop string ended it: the model would go on

    def _accept(self) -> None:
        if not self.accepted:
            self.accepted = True
            self.on_accepted()
            self.attendance.restart()

    def _take(self, choice: int, batch: TokenBatch) -> None:
        if batch.token_ids or batch.finish_reason is not None:
            self.journal.write(choice, batch)
            self.feed.push(choice, batch)

    def _fail(self, failure: Failure) -> None:
        if not self.feed.finished:  # what comes after the last event changes nothing
            self.journal.write(0, failure)
            self.feed.fail(failure)
