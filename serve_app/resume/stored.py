"""What the journal of a stream holds, read without following it; and its end, whoever generates it.

Promises that a stream that has just ended elsewhere reads as ended. Knows no text and no HTTP.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from msgspec.structs import replace

from serve_app.core import Failure, MessageError, TokenBatch, decode_replies, encode_replies
from serve_app.generation.output_tokens import BatchError, OutputTokens
from serve_app.resume.context import StreamContext
from serve_app.resume.journal_store import Append, JournalView, LeaseAction, LeaseStatus
from serve_app.resume.owner import CANCELLED
from serve_app.resume.records import StreamDocument, read_document
from serve_app.resume.refusals import OwnerSilent, StreamGone
from serve_app.resume.stream_id import loggable
from serve_app.resume.transcript import logprob_entries
from serve_app.resume.writer import new_owner

logger = logging.getLogger(__name__)

_DECODED_AT_ONCE = 1000
"""Tokens and their alternatives that are read between two turns of the event loop: about 1 ms."""


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

    async def take(self, view: JournalView) -> None:
        """Take in the records of `view`, and let other tasks run meanwhile. Raises `BatchError` and `MessageError`."""
        self.records += len(view.records)
        entries = 0
        for record in view.records:
            for choice, reply in decode_replies(record):
                if not isinstance(reply, Failure):
                    self._outputs[choice].append(reply)
                    entries += logprob_entries(reply)
                elif not self.ended:  # a stream has one end
                    self.failure = reply
            if entries >= _DECODED_AT_ONCE:
                entries = 0
                await asyncio.sleep(0)

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
        await reading.take(view)
        while not (view.finished or reading.ended) and view.leased and (left_s := deadline - loop.time()) > 0:
            view = await context.look(stream_id, reading.records, left_s)
            await reading.take(view)
    except (MessageError, BatchError, LookupError) as error:
        logger.error("the journal of stream %s can't be read", loggable(stream_id), exc_info=error)
        raise StreamGone from error
    return reading.result(view)


async def end_stored(
    context: StreamContext, stream_id: str, has_ended: Callable[[JournalView], Awaitable[bool]]
) -> None:
    """Have the stream's owner end it as cancelled, or do so here if it has none. Returns once the end is written.

    A stream that has ended stays as it is. `has_ended` tells from a whole journal whether its tokens are a whole
    answer: its owner may have died before it wrote the end. Raises `StreamGone` and `StoreUnavailable`, and
    `OwnerSilent` if the owner does not react within `settle_s`; it ends the stream as soon as it reaches the store.
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
            whole = await context.look(stream_id, 0)
            ends = () if await has_ended(whole) else (encode_replies([(0, CANCELLED)]),)
            append = Append(stream_id, owner, len(whole.records), ends, LeaseAction.FINISH)
            (result,) = await context.reach(partial(context.store.append, [append]))
            if result.lease is LeaseStatus.HELD:
                return
    logger.warning("stream %s was not ended within %g s", loggable(stream_id), context.settings.settle_s)
    raise OwnerSilent
