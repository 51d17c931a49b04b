"""Responses that are kept, on their way: answered whole, as events, or in the background.

Promises the same document and the same events at every ingress, and that a response whose caller went before it had
its id leaves nothing behind. Knows no field of a request.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from contextvars import Context
from functools import partial
from typing import Any

from starlette.responses import Response

from serve_app.api.callers import caller_digest
from serve_app.api.http.endpoint import Call
from serve_app.api.http.sse import EventStream, StreamSettings
from serve_app.api.responses.ids import stream_id_of
from serve_app.api.responses.kept import KeptResponses, not_found, store_errors
from serve_app.api.responses.writer import error_event
from serve_app.api.weights import replaced
from serve_app.api.wire import ParsedRequest
from serve_app.chat.tokenizer import ChatTokenizer
from serve_app.core import Fingerprint, RequestError
from serve_app.observability import metrics as m
from serve_app.observability.logs import RequestRecord
from serve_app.resume.event_log import Mark
from serve_app.resume.records import StreamDocument
from serve_app.resume.stored import StoredStream
from serve_app.resume.stream import ResumableStream
from serve_app.resume.transcript import Transcript

logger = logging.getLogger(__name__)

_JSON = json.JSONEncoder(ensure_ascii=False)


class KeptAnswers:
    """Begins kept responses, and gives their events."""

    def __init__(
        self, kept: KeptResponses, tokenizer: ChatTokenizer, settings: StreamSettings, metrics: m.MetricsSink
    ) -> None:
        self._kept = kept
        self._tokenizer = tokenizer
        self._settings = settings
        self._metrics = metrics
        self._ending: set[asyncio.Task[None]] = set()
        """One task for each response that this ingress began in the background."""

    async def begin(self, call: Call, parsed: ParsedRequest, *, streams: bool) -> Response | EventStream:
        """The answer to a new request. Raises `RequestError`."""
        request, response_id = parsed.resolved, parsed.settings["response"]["id"]
        self._kept.weights.saw(request.fingerprint)
        stream_id = stream_id_of(response_id) or ""
        background: bool = parsed.settings["response"]["background"]
        caller = caller_digest(stream_id, call.headers)
        document = StreamDocument(request, caller, "responses", parsed.settings, background)
        stream = self._kept.streams.new(stream_id, document, self._transcript(document))
        if streams:
            events = await self._events(call.record, stream, None)
            if background:
                self._count_at_its_end(stream)
            return events
        if background:
            with store_errors(response_id):
                await stream.begin()
            call.record.outcome = "background"
            self._count_at_its_end(stream)
        else:
            await self._whole(call.record, stream)
        return json_response(await self._document(stream), request.seed)

    async def events(self, call: Call, response_id: str, position: int) -> EventStream:
        """The events of a kept response from number `position` on, as they come. Raises `RequestError`."""
        stream_id = stream_id_of(response_id)
        if stream_id is None:
            raise not_found(response_id)
        fingerprint = await self._kept.weights.fingerprint()
        with store_errors(response_id):
            stream = await self._kept.streams.find(stream_id, partial(self._found, fingerprint))
        self._kept.check(call, response_id, stream.document)
        return await self._events(call.record, stream, position)

    async def take_over(self, call: Call, response_id: str) -> None:
        """Go on here with a background response whose ingress died. Raises `RequestError`."""
        fingerprint = await self._kept.weights.fingerprint()
        with store_errors(response_id):
            await self._kept.streams.find(stream_id_of(response_id) or "", partial(self._found, fingerprint))

    def _count_at_its_end(self, stream: ResumableStream) -> None:
        """Count the tokens of a response in the background: its request is answered before they come."""

        async def count() -> None:
            await stream.closed()
            transcript = stream.feed.transcript
            self._metrics.count(m.PROMPT_TOKENS, stream.document.request.prompt_tokens)
            self._metrics.count(m.CACHED_PROMPT_TOKENS, transcript.cached_prompt_tokens)
            self._metrics.count(m.OUTPUT_TOKENS, transcript.tokens)
            outcome = transcript.outcome if stream.finished else "left to another ingress"
            request_id = stream.document.request.request_id
            logger.info("request %s ended in the background: %s, %d tokens", request_id, outcome, transcript.tokens)

        # A context of its own: Serve cancels all that was called in the context of a request when its client goes.
        task = asyncio.create_task(count(), name="background response", context=Context())
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _whole(self, record: RequestRecord, stream: ResumableStream) -> None:
        """Generate the response to its end. A client that goes now knows no id, so its response is dropped."""
        try:
            with stream.attended(), store_errors(response_id_of(stream)):
                await stream.begin()
                async with aclosing(_read(record, stream, 0, sys.maxsize, new=True)) as pieces:
                    async for _ in pieces:
                        pass
            if (failure := stream.feed.transcript.whole()[1]) is not None:
                raise RequestError.of(failure)
        except BaseException:
            await stream.discard()
            raise

    async def _document(self, stream: ResumableStream) -> dict[str, Any]:
        outputs, failure = stream.feed.transcript.whole()
        return await self._kept.document(StoredStream(stream.document, tuple(outputs), failure, stream.finished, True))

    async def _events(self, record: RequestRecord, stream: ResumableStream, position: int | None) -> EventStream:
        """A response with the events from `position` on. None: the response has yet to begin."""

        def on_error(error: RequestError) -> bytes:
            return error_event(error, len(stream.feed.events))

        return await EventStream(
            self._chunks(record, stream, position),
            on_error=on_error,
            settings=self._settings,
            headers={"x-seed": str(stream.document.request.seed)},
            paced=True,
        ).opened()

    async def _chunks(
        self, record: RequestRecord, stream: ResumableStream, position: int | None
    ) -> AsyncGenerator[bytes, None]:
        """The first chunk is empty and lets the headers go out."""
        lag_bytes = self._settings.slow_reader_bytes
        with stream.attended(), store_errors(response_id_of(stream)):
            if position is None:
                await stream.begin()
            yield b""
            async with aclosing(_read(record, stream, position or 0, lag_bytes, new=position is None)) as pieces:
                async for piece in pieces:
                    yield piece

    def _found(self, fingerprint: Fingerprint, document: StreamDocument) -> Transcript:
        if document.request.fingerprint != fingerprint:
            raise replaced("response")
        return self._transcript(document)

    def _transcript(self, document: StreamDocument) -> Transcript:
        return Transcript(document.request, self._tokenizer, partial(self._kept.writer, document))


async def _read(
    record: RequestRecord, stream: ResumableStream, position: int, max_lag_bytes: int, *, new: bool
) -> AsyncGenerator[bytes, None]:
    """Events from `position` on, to the end. `new`: the request with the prompt, for which cached tokens count.

    Tokens of a response in the background do not count for its readers.
    """
    transcript = stream.feed.transcript
    counts = not stream.document.background
    seen = 0 if new else transcript.tokens
    async with aclosing(stream.feed.read(Mark(position), max_lag_bytes)) as pieces:
        async for _, events in pieces:
            if counts and transcript.tokens > seen:
                record.saw_tokens(transcript.tokens - seen)
                seen = transcript.tokens
            if counts and new:
                record.cached_prompt_tokens = transcript.cached_prompt_tokens
            yield b"".join(event.content for event in events)
    record.outcome = transcript.outcome


def response_id_of(stream: ResumableStream) -> str:
    """The id of the response that this stream is."""
    response_id: str = stream.document.settings["response"]["id"]
    return response_id


def json_response(document: dict[str, Any], seed: int | None = None) -> Response:
    """A document as an answer."""
    headers = {} if seed is None else {"x-seed": str(seed)}
    return Response(_JSON.encode(document).encode(), headers=headers, media_type="application/json")
