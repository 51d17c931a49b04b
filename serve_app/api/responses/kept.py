"""Responses that are kept: found by id for the caller who made them, as documents and as items.

Promises that a response of other credentials looks as if it never was. Knows no endpoint.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from msgspec import structs

from serve_app.api.callers import is_caller
from serve_app.api.errors import ApiError, bad_request
from serve_app.api.http.endpoint import Call
from serve_app.api.respond import INLINE_ENTRIES
from serve_app.api.responses.ids import stream_id_of
from serve_app.api.responses.items import Item
from serve_app.api.responses.writer import ResponseWriter
from serve_app.api.weights import ServedWeights, replaced
from serve_app.chat.token_texts import TokenTexts
from serve_app.core import FailureCode, RequestError
from serve_app.generation.completion import Completion
from serve_app.generation.service import CompletionService
from serve_app.resume.journal_store import StoreUnavailable
from serve_app.resume.records import StreamDocument
from serve_app.resume.refusals import JournalsFull, StreamGone
from serve_app.resume.registry import ResumableStreams
from serve_app.resume.stored import StoredStream
from serve_app.resume.stream import ResumableStream
from serve_app.resume.transcript import Transcript, logprob_entries

_JUST_ENDED_S = 0.3
"""How long a read waits for the end of a response: what a client has seen the end of is in the store a tick later."""
_NEXT_TURN_S = 5.0
"""How long a request waits for the end of the response that it continues."""

logger = logging.getLogger(__name__)


class KeptResponses:
    """The kept responses of all callers."""

    def __init__(self, service: CompletionService, streams: ResumableStreams) -> None:
        self.streams = streams
        self.weights = ServedWeights(service)
        self._tokenizer = service.tokenizer
        self._tokens = TokenTexts(service.tokenizer)

    async def stored(self, call: Call, response_id: str, patience_s: float = _JUST_ENDED_S) -> StoredStream:
        """The response as its journal has it. Raises `RequestError`: 404 for one that this caller does not have.

        Its tokens may be those of other weights than are served now: only what shows them needs the weights.
        """
        stream_id = _stream_id(response_id)
        with store_errors(response_id):
            stored = await self.streams.stored(stream_id, patience_s)
        _check(call, response_id, stored.document)
        return stored

    async def find(self, call: Call, response_id: str) -> ResumableStream:
        """The stream of the response, whoever generates it. A background response whose ingress died goes on here.

        Raises `RequestError`, like `stored`, and 410 for tokens of other weights.
        """
        stream_id = _stream_id(response_id)
        fingerprint = await self.weights.fingerprint()

        def found(document: StreamDocument) -> Transcript:
            _check(call, response_id, document)
            if document.request.fingerprint != fingerprint:
                raise replaced("response")
            return self.transcript(document)

        with store_errors(response_id):
            stream = await self.streams.find(stream_id, found)
        _check(call, response_id, stream.document)
        return stream

    async def taken_over(self, call: Call, response_id: str, patience_s: float = _JUST_ENDED_S) -> StoredStream:
        """As `stored`. A background response whose ingress died goes on here, and is waited for as if it had not."""
        stored = await self.stored(call, response_id, patience_s)
        if stored.finished or stored.leased or not stored.document.background:
            return stored
        try:
            stream = await self.find(call, response_id)
            async with asyncio.timeout(patience_s):
                await stream.closed()
        except TimeoutError:
            pass
        except RequestError as error:
            logger.warning("a response in the background can't go on here now: %s", error.code)
            return stored
        return await self.stored(call, response_id, 0.0)

    async def cancel(self, call: Call, response_id: str) -> None:
        """End a response in the background, whoever generates it. Raises `RequestError`."""
        with store_errors(response_id):
            await self.streams.cancel(_stream_id(response_id), self.transcript)

    async def document(self, stored: StoredStream) -> bytes:
        """The response as clients see it: JSON. Raises `RequestError`: 410 for tokens of other weights."""
        await self._require_weights(stored)
        return await self.written(stored)

    async def written(self, stored: StoredStream) -> bytes:
        """As `document`, for a response that was just generated."""

        def written() -> bytes:
            writer = self._filled(stored)
            return writer.document(_error(stored, writer), going_on=_goes_on(stored)).encode()

        in_loop = logprob_entries(stored.outputs[0]) <= INLINE_ENTRIES
        return written() if in_loop else await asyncio.to_thread(written)

    async def _items(self, stored: StoredStream) -> tuple[str, list[Item]]:
        """(status, all items up to the end of a response). Its logprobs are not part of the conversation."""
        await self._require_weights(stored)
        bare = structs.replace(stored.outputs[0], logprobs=None)
        short = dataclasses.replace(stored, outputs=(bare,))

        def read() -> tuple[str, list[Item]]:
            writer = self._filled(short)
            error, going_on = _error(stored, writer), _goes_on(stored)
            output = json.loads(writer.output(error, going_on=going_on))
            return writer.status(error, going_on=going_on), [*stored.document.settings["input"], *output]

        return read() if len(bare.token_ids) <= INLINE_ENTRIES else await asyncio.to_thread(read)

    def _filled(self, stored: StoredStream) -> ResponseWriter:
        """A writer that has all tokens of the response."""
        batch, writer = stored.outputs[0], self._writer(stored.document)
        if batch.token_ids or batch.finish_reason is not None:
            completion = Completion(stored.document.request, self._tokenizer)
            writer.add(completion.push(0, batch), completion.usage)
        return writer

    async def _require_weights(self, stored: StoredStream) -> None:
        if stored.document.request.fingerprint != await self.weights.fingerprint():
            raise replaced("response")

    def transcript(self, document: StreamDocument) -> Transcript:
        """The events of a response, from the first on."""
        return Transcript(document.request, self._tokenizer, partial(self._writer, document))

    def _writer(self, document: StreamDocument) -> ResponseWriter:
        return ResponseWriter(document.settings, self._tokens)

    async def conversation(self, call: Call, response_id: str) -> list[Item]:
        """All items up to the end of a response, which a request continues. Raises `RequestError`."""
        try:
            stored = await self.taken_over(call, response_id, _NEXT_TURN_S)
        except ApiError as error:
            if error.status != 404:
                raise
            message = f"Previous response with id '{response_id[:100]}' not found."
            raise bad_request(message, param="previous_response_id", code="previous_response_not_found") from None
        status, items = await self._items(stored)
        if status in ("queued", "in_progress"):
            message = f"The response '{response_id}' is still {status}; wait for its end."
            raise bad_request(message, param="previous_response_id", code="invalid_value")
        return items

    async def items_or_none(self, call: Call, response_id: str) -> list[Item]:
        """All items up to the end of a response; none if there is no such response. Raises `RequestError`."""
        try:
            stored = await self.stored(call, response_id)
        except ApiError as error:
            if error.status != 404:
                raise
            return []
        return (await self._items(stored))[1]


def _stream_id(response_id: str) -> str:
    """The stream of the response. Raises `ApiError` (404)."""
    stream_id = stream_id_of(response_id)
    if stream_id is None:
        raise not_found(response_id)
    return stream_id


def _check(call: Call, response_id: str, document: StreamDocument) -> None:
    """Raise `ApiError` (404) unless the caller made the response."""
    if document.wire_format != "responses" or not is_caller(document.caller, _stream_id(response_id), call):
        raise not_found(response_id)


def _error(stored: StoredStream, writer: ResponseWriter) -> RequestError | None:
    """What ended the response early. `writer` has all of its tokens."""
    return None if stored.failure is None or writer.complete else RequestError.of(stored.failure)


def _goes_on(stored: StoredStream) -> bool:
    """Somebody generates it, or will, unless it has ended."""
    return stored.leased or stored.document.background


def not_found(response_id: str) -> ApiError:
    """404, in OpenAI's words."""
    return ApiError(404, f"Response with id '{response_id[:100]}' not found.", code="response_not_found")


@contextmanager
def store_errors(response_id: str) -> Iterator[None]:
    """Make errors of the store say what a caller does who knows responses and no streams."""
    try:
        yield
    except StreamGone as error:
        if error.code != "stream_gone":
            raise
        raise not_found(response_id) from None
    except JournalsFull:
        message = "The limit of kept responses is reached; try again later, or send store: false."
        raise RequestError(message, code=FailureCode.OVERLOADED) from None
    except StoreUnavailable as error:
        message = "The store of responses can't be reached; try again, or send store: false."
        raise RequestError(message, code=error.code, retry_after_s=error.retry_after_s) from None
