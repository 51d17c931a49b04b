"""Responses that are kept, on their way: answered whole, as events, or in the background.

Promises the same document and the same events at every ingress, and that a response whose caller went before it had
its id leaves nothing behind. Knows no field of a request.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from contextvars import Context
from dataclasses import dataclass

from starlette.responses import Response

from serve_app.api.callers import caller_digest
from serve_app.api.http.endpoint import Call
from serve_app.api.http.sse import EventStream, StreamSettings
from serve_app.api.rate_limits import outlive
from serve_app.api.responses.ids import stream_id_of
from serve_app.api.responses.kept import KeptResponses, store_errors
from serve_app.api.responses.writer import error_event
from serve_app.api.wire import ParsedRequest
from serve_app.core import RequestError
from serve_app.observability import metrics as m
from serve_app.observability.logs import NOBODY, RequestRecord
from serve_app.resume.event_log import Mark
from serve_app.resume.records import StreamDocument
from serve_app.resume.stored import StoredStream
from serve_app.resume.stream import ResumableStream

logger = logging.getLogger(__name__)


class KeptAnswers:
    """Begins kept responses, and gives their events."""

    def __init__(self, kept: KeptResponses, settings: StreamSettings, metrics: m.MetricsSink) -> None:
        self._kept = kept
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
        caller = caller_digest(stream_id, call)
        document = StreamDocument(request, caller, "responses", parsed.settings, background)
        stream = self._kept.streams.new(stream_id, document, self._kept.transcript(document))
        outlive(call, stream)
        if streams:
            events = await self._events(_Reader(call.record, stream, 0, new=True))
            if background:
                self._count_at_its_end(stream, call.record)
            return events
        if background:
            with store_errors(response_id):
                await stream.begin()
            call.record.outcome = "background"
            self._count_at_its_end(stream, call.record)
        else:
            await self._whole(call.record, stream)
        outputs, failure = stream.feed.transcript.whole()
        stored = StoredStream(document, tuple(outputs), failure, stream.finished, leased=True)
        return json_response(await self._kept.written(stored), request.seed)

    async def events(self, call: Call, response_id: str, position: int) -> EventStream:
        """The events of a kept response from number `position` on, as they come. Raises `RequestError`."""
        stream = await self._kept.find(call, response_id)
        return await self._events(_Reader(call.record, stream, position, new=False))

    def _count_at_its_end(self, stream: ResumableStream, begun_by: RequestRecord) -> None:
        """Count the tokens of a response in the background: its request is answered before they come."""

        async def count() -> None:
            await stream.closed()
            transcript = stream.feed.transcript
            self._metrics.count(m.PROMPT_TOKENS, stream.document.request.prompt_tokens)
            self._metrics.count(m.CACHED_PROMPT_TOKENS, transcript.cached_prompt_tokens)
            self._metrics.count(m.OUTPUT_TOKENS, transcript.tokens)
            if begun_by.tenant != NOBODY:
                of_key = {"tenant": begun_by.tenant, "key": begun_by.key}
                prompt_tokens = stream.document.request.prompt_tokens
                self._metrics.count(m.KEY_TOKENS, prompt_tokens, {**of_key, "kind": "prompt"})
                self._metrics.count(m.KEY_TOKENS, transcript.tokens, {**of_key, "kind": "output"})
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
                async with aclosing(_Reader(record, stream, 0, new=True).read(sys.maxsize)) as pieces:
                    async for _ in pieces:
                        pass
            if (failure := stream.feed.transcript.whole()[1]) is not None:
                raise RequestError.of(failure)
        except BaseException:
            await stream.discard()
            raise

    async def _events(self, reader: _Reader) -> EventStream:
        return await EventStream(
            self._chunks(reader),
            on_error=reader.error,
            settings=self._settings,
            headers={"x-seed": str(reader.stream.document.request.seed)},
            paced=True,
        ).opened()

    async def _chunks(self, reader: _Reader) -> AsyncGenerator[bytes, None]:
        """The first chunk is empty and lets the headers go out."""
        stream = reader.stream
        with stream.attended(), store_errors(response_id_of(stream)):
            if reader.new:
                await stream.begin()
            yield b""
            async with aclosing(reader.read(self._settings.slow_reader_bytes)) as pieces:
                async for piece in pieces:
                    yield piece


@dataclass(eq=False)
class _Reader:
    """One reader of the events of a response."""

    record: RequestRecord
    stream: ResumableStream
    position: int
    """Number of the next event."""
    new: bool
    """Its request has the prompt and begins the response: cached tokens count for it."""

    async def read(self, max_lag_bytes: int) -> AsyncGenerator[bytes, None]:
        """The events from `position` on, to the end.

        Tokens of a response in the background do not count for its readers.
        """
        transcript, record = self.stream.feed.transcript, self.record
        counts = not self.stream.document.background
        seen = 0 if self.new else transcript.tokens
        async with aclosing(self.stream.feed.read(Mark(self.position), max_lag_bytes)) as pieces:
            async for _, events in pieces:
                if counts and transcript.tokens > seen:
                    record.saw_tokens(transcript.tokens - seen)
                    seen = transcript.tokens
                if counts and self.new:
                    record.cached_prompt_tokens = transcript.cached_prompt_tokens
                self.position += len(events)
                yield b"".join(event.content for event in events)
        record.outcome = transcript.outcome

    def error(self, error: RequestError) -> bytes:
        """The event of an error that concerns this reader alone. Its number: see `ResponsesFormat.reader_error`."""
        return error_event(error, self.position - 1)


def response_id_of(stream: ResumableStream) -> str:
    """The id of the response that this stream is."""
    response_id: str = stream.document.settings["response"]["id"]
    return response_id


def json_response(document: bytes, seed: int | None = None) -> Response:
    """A document, which is JSON, as an answer."""
    headers = {} if seed is None else {"x-seed": str(seed)}
    return Response(document, headers=headers, media_type="application/json")
