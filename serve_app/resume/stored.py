"""What the journal of a stream holds, read without following it; and its end, whoever generates it.

Promises that a stream that has just ended elsewhere reads as ended. Knows no text and no HTTP.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from functools import partial

from msgspec.structs import replace

from serve_app.core import Failure, MessageError, TokenBatch, decode_replies, encode_replies
from serve_app.generation.output_tokens import BatchError, OutputTokens
from serve_app.resume.context import StreamContext
from serve_app.resume.journal_store import Append, JournalView, LeaseAction
from serve_app.resume.owner import CANCELLED
from serve_app.resume.records import StreamDocument, read_document
from serve_app.resume.refusals import StreamGone
from serve_app.resume.stream_id import loggable
from serve_app.resume.writer import new_owner

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StoredStream:
    """A stream as its journal has it."""

    document: StreamDocument
    outputs: tuple[TokenBatch, ...]
    """All tokens of each choice so far, with their finish reason if it was written."""
    failure: Failure | None
    """What ended it early."""
    finished: bool
    """Nothing more will come."""
    leased: bool
    """Somebody generates it."""


class _Reading:
    """The contents of a journal while it is read."""

    def __init__(self, document: StreamDocument) -> None:
        self.document = document
        self.failure: Failure | None = None
        self.records = 0
        self._outputs = [OutputTokens(request) for request in document.request.requests]

    def take(self, view: JournalView) -> None:
        """Raises `BatchError` and `MessageError`."""
        self.records += len(view.records)
        for record in view.records:
            for choice, reply in decode_replies(record):
                if isinstance(reply, Failure):
                    self.failure = reply
                else:
                    self._outputs[choice].append(reply)

    @property
    def ended(self) -> bool:
        """The end was written, though the journal may not be finished yet."""
        return self.failure is not None or all(output.finish_reason is not None for output in self._outputs)

    def result(self, view: JournalView) -> StoredStream:
        batches = tuple(
            replace(output.tokens(0), finish_reason=output.finish_reason, stats=output.stats)
            for output in self._outputs
        )
        return StoredStream(self.document, batches, self.failure, view.finished or self.ended, view.leased)


async def read_stored(context: StreamContext, stream_id: str, patience_s: float) -> StoredStream:
    """What the journal holds. While somebody generates the stream, waits at most `patience_s` for its end.

    An owner writes a tick after it has told its reader: so a caller that has read the end finds it here as well.
    Raises `StreamGone` and `StoreUnavailable`.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + patience_s
    view = await context.look(stream_id, 0)
    try:
        reading = _Reading(read_document(view.document)) if view.document else None
        if reading is None:  # it was erased
            raise StreamGone
        reading.take(view)
        while not (view.finished or reading.ended) and view.leased and (left_s := deadline - loop.time()) > 0:
            view = await context.look(stream_id, reading.records, left_s)
            reading.take(view)
    except (MessageError, BatchError, LookupError) as error:
        logger.error("the journal of stream %s can't be read", loggable(stream_id), exc_info=error)
        raise StreamGone from error
    return reading.result(view)


async def end_stored(context: StreamContext, stream_id: str) -> None:
    """Have the stream's owner end it as cancelled, or do so here if it has none. Returns once the end is written.

    A stream that has ended stays as it is. Raises `StreamGone`, and `StoreUnavailable` if its owner does not react.
    """
    if not await context.reach(partial(context.store.ask_to_stop, stream_id)):
        raise StreamGone
    loop = asyncio.get_running_loop()
    deadline = loop.time() + context.settings.settle_s
    position = 0
    while (left_s := deadline - loop.time()) > 0:
        view = await context.look(stream_id, position, min(left_s, context.settings.lease_s))
        position += len(view.records)
        if view.finished:
            return
        owner = new_owner()
        if not view.leased and await context.reach(partial(context.store.acquire, stream_id, owner)):
            position += len((await context.look(stream_id, position)).records)
            record = encode_replies([(0, CANCELLED)])
            append = Append(stream_id, owner, position, (record,), LeaseAction.FINISH)
            await context.reach(partial(context.store.append, [append]))
            return
    logger.warning("stream %s was not ended within %g s", loggable(stream_id), context.settings.settle_s)
