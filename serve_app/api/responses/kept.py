"""Responses that are kept: found by id for the caller who made them, as documents and as items.

Promises that a response of other credentials looks as if it never was. Knows no endpoint.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from serve_app.api.callers import is_caller
from serve_app.api.errors import ApiError, bad_request
from serve_app.api.http.endpoint import Call
from serve_app.api.responses.ids import stream_id_of
from serve_app.api.responses.items import Item
from serve_app.api.responses.writer import ResponseWriter, failure_of
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

_JUST_ENDED_S = 0.3
"""How long a read waits for the end of a response: what a client has seen the end of is in the store a tick later."""
_NEXT_TURN_S = 5.0
"""How long a request waits for the end of the response that it continues."""
_INLINE_TOKENS = 2_000
"""Longest output that becomes a document in the event loop: about 10 ms."""


class KeptResponses:
    """The kept responses of all callers."""

    def __init__(self, service: CompletionService, streams: ResumableStreams) -> None:
        self.streams = streams
        self.weights = ServedWeights(service)
        self._tokenizer = service.tokenizer
        self._tokens = TokenTexts(service.tokenizer)

    async def stored(self, call: Call, response_id: str, patience_s: float = _JUST_ENDED_S) -> StoredStream:
        """The response as its journal has it. Raises `RequestError`: 404 for one that this caller does not have."""
        stream_id = stream_id_of(response_id)
        if stream_id is None:
            raise not_found(response_id)
        fingerprint = await self.weights.fingerprint()
        with store_errors(response_id):
            stored = await self.streams.stored(stream_id, patience_s)
        self.check(call, response_id, stored.document)
        if stored.document.request.fingerprint != fingerprint:
            raise replaced("response")
        return stored

    @staticmethod
    def check(call: Call, response_id: str, document: StreamDocument) -> None:
        """Raise `ApiError` (404) unless the caller made the response."""
        stream_id = stream_id_of(response_id) or ""
        if document.wire_format != "responses" or not is_caller(document.caller, stream_id, call.headers):
            raise not_found(response_id)

    async def document(self, stored: StoredStream) -> dict[str, Any]:
        """The response as clients see it."""
        batch = stored.outputs[0]

        def written() -> dict[str, Any]:
            writer = self.writer(stored.document)
            if batch.token_ids or batch.finish_reason is not None:
                completion = Completion(stored.document.request, self._tokenizer)
                delta = completion.push(0, batch)
                writer.add(delta, completion.usage)
            going_on = stored.leased or stored.document.background
            return writer.document(failure_of(stored.failure), going_on=going_on)

        return written() if len(batch.token_ids) <= _INLINE_TOKENS else await asyncio.to_thread(written)

    def writer(self, document: StreamDocument) -> ResponseWriter:
        """A writer of this response, from the beginning."""
        return ResponseWriter(document.settings, self._tokens)

    async def conversation(self, call: Call, response_id: str) -> list[Item]:
        """All items up to the end of a response, which a request continues. Raises `RequestError`."""
        try:
            stored = await self.stored(call, response_id, _NEXT_TURN_S)
        except ApiError as error:
            if error.status != 404:
                raise
            message = f"Previous response with id '{response_id[:100]}' not found."
            raise bad_request(message, param="previous_response_id", code="previous_response_not_found") from None
        document = await self.document(stored)
        if document["status"] in ("queued", "in_progress"):
            message = f"The response '{response_id}' is still {document['status']}; wait for its end."
            raise bad_request(message, param="previous_response_id", code="invalid_value")
        return [*stored.document.settings["input"], *document["output"]]

    async def items_or_none(self, call: Call, response_id: str) -> list[Item]:
        """All items up to the end of a response; none if there is no such response. Raises `RequestError`."""
        try:
            stored = await self.stored(call, response_id)
        except ApiError as error:
            if error.status != 404:
                raise
            return []
        return [*stored.document.settings["input"], *(await self.document(stored))["output"]]


def not_found(response_id: str) -> ApiError:
    """404, in OpenAI's words."""
    return ApiError(404, f"Response with id '{response_id[:100]}' not found.", code="response_not_found")


@contextmanager
def store_errors(response_id: str) -> Iterator[None]:
    """Tell errors of the store in words of a caller who knows responses and no streams."""
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
