"""Resuming over HTTP: requests for a resumable stream, event ids, and answers to `Last-Event-ID`.

Promises that a caller gets only streams that its tenant opened, or without keys the same credentials, and that every
refusal says whether to try again. Knows no store and no owner: `resume.registry` does.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from functools import partial

from starlette.responses import Response

from serve_app.api.callers import caller_digest, is_caller
from serve_app.api.errors import ApiError, bad_request
from serve_app.api.headers import LAST_EVENT_ID_HEADER, RESUME_HEADER, RESUME_QUERY, STREAM_ID_HEADER
from serve_app.api.http.endpoint import Call
from serve_app.api.http.sse import EventStream, StreamSettings
from serve_app.api.rate_limits import outlive
from serve_app.api.weights import ServedWeights, replaced
from serve_app.api.wire import ParsedRequest, WireFormat
from serve_app.core import RequestError
from serve_app.generation.service import CompletionService
from serve_app.observability.logs import RequestRecord
from serve_app.resume.event_log import Mark
from serve_app.resume.records import StreamDocument
from serve_app.resume.refusals import StreamGone
from serve_app.resume.registry import ResumableStreams
from serve_app.resume.stream import ResumableStream
from serve_app.resume.transcript import Event, Transcript

ENDPOINT = "/v1/streams/{stream_id}"

_RETRY = b"retry: 1000\n"
"""Milliseconds that an EventSource waits before it reconnects. Its own default is 3 to 5 s."""
_STREAM_ID = re.compile(r"[A-Za-z0-9_-]{22}")
_EVENT_ID = re.compile(r"([A-Za-z0-9_-]{22}):([0-9]{1,9})(?::([0-9a-f]{8}))?")
"""Stream id, index of the next event, digest of the text so far. Event ids of earlier versions have no digest."""
_CHECK_WAIT_S = 5.0
"""How long an answer waits if its reader already has events that this process does not have yet. If the stream is
refused within this time, the refusal gets its HTTP status. If the stream's ingress died, the events are here after a
lease (1 s) and the time to generate the last 0.1 s again."""


class Resume:
    """Opens and continues resumable streams, for all endpoints that stream."""

    def __init__(
        self,
        service: CompletionService,
        streams: ResumableStreams,
        formats: Iterable[WireFormat],
        settings: StreamSettings,
    ) -> None:
        self._service = service
        self._streams = streams
        self._formats = {wire.name: wire for wire in formats}
        self._settings = settings
        self._weights = ServedWeights(service)

    def wanted(self, call: Call) -> bool:
        """Whether the caller asks for a stream that can be resumed. Raises `ApiError`."""
        asked = {RESUME_HEADER: call.headers.get(RESUME_HEADER)}
        if call.body is None:
            asked[RESUME_QUERY] = call.query.get(RESUME_QUERY)
        for name, value in asked.items():
            if value not in (None, "", "0", "1"):
                raise bad_request(f"{name} must be 1 or 0.", param=name, code="invalid_value")
        return "1" in asked.values()

    async def continued(self, call: Call) -> Response | EventStream | None:
        """The rest of the stream that the caller names in `Last-Event-ID`; None when it asks for a new stream.

        A client that can only repeat its request (EventSource, fetch-event-source) can thus continue a stream too.
        """
        last_event_id = call.headers.get(LAST_EVENT_ID_HEADER)
        if not self.wanted(call) or not last_event_id:
            return None
        return await self._rest(call, *_parse_event_id(last_event_id))

    async def handle(self, call: Call) -> Response | EventStream:
        """`GET /v1/streams/{stream_id}`. Raises `ApiError`."""
        stream_id = _stream_id(call)
        mark, last_event_id = Mark(), call.headers.get(LAST_EVENT_ID_HEADER)
        if last_event_id:
            of_stream, mark = _parse_event_id(last_event_id)
            if of_stream != stream_id:
                raise bad_request("Last-Event-ID belongs to another stream.", code="invalid_event_id")
        return await self._rest(call, stream_id, mark)

    async def cancel(self, call: Call) -> Response:
        """`DELETE /v1/streams/{stream_id}`: no more of it is generated. Raises `ApiError`."""
        stream_id = _stream_id(call)

        def found(document: StreamDocument) -> Transcript:
            _check_caller(call, stream_id, document)
            return self._transcript(document)

        stream = await self._streams.find(stream_id, found)
        _check_caller(call, stream_id, stream.document)
        if not stream.finished:
            await self._streams.cancel(stream_id, found)
        call.record.outcome = "cancelled"
        return Response(status_code=204)

    async def open(self, call: Call, parsed: ParsedRequest, wire: WireFormat) -> EventStream:
        """A new stream that can be resumed. Raises `RequestError`."""
        request = parsed.resolved
        self._weights.saw(request.fingerprint)
        stream_id = self._streams.new_id()
        document = StreamDocument(request, caller_digest(stream_id, call), wire.name, parsed.settings)
        stream = self._streams.new(stream_id, document, self._transcript(document))
        outlive(call, stream)
        return await self._answer(call.record, stream, None)

    async def _rest(self, call: Call, stream_id: str, mark: Mark) -> Response | EventStream:
        call.record.endpoint = ENDPOINT
        fingerprint = await self._weights.fingerprint()

        def found(document: StreamDocument) -> Transcript:
            _check_caller(call, stream_id, document)
            if document.request.fingerprint != fingerprint:
                raise replaced("stream")
            return self._transcript(document)

        stream = await self._streams.find(stream_id, found)
        _check_caller(call, stream_id, stream.document)
        if stream.finished and mark.position >= len(stream.feed.events):
            await stream.feed.check(mark, 0)
            call.record.outcome = "delivered"
            return Response(status_code=204, headers={STREAM_ID_HEADER: stream_id})
        return await self._answer(call.record, stream, mark)

    async def _answer(self, record: RequestRecord, stream: ResumableStream, mark: Mark | None) -> EventStream:
        """A response with the events from `mark` on. None: the stream has yet to begin."""
        document, reader = stream.document, _Reader(record, stream, mark)
        wire = self._wire(document)

        def on_error(error: RequestError) -> bytes:
            return wire.reader_error(error, document.request, document.settings, reader.position)

        return await EventStream(
            reader.chunks(self._settings.slow_reader_bytes),
            on_error=on_error,
            settings=self._settings,
            headers={STREAM_ID_HEADER: stream.id, "x-seed": str(document.request.seed)},
            paced=True,
        ).opened()

    def _transcript(self, document: StreamDocument) -> Transcript:
        """Raises `StreamGone`, as `_wire` does."""
        new_writer = partial(self._wire(document).writer, document.request, document.settings)
        return Transcript(document.request, self._service.tokenizer, new_writer)

    def _wire(self, document: StreamDocument) -> WireFormat:
        """Raises `StreamGone` for a wire format that only another version of this program has."""
        wire = self._formats.get(document.wire_format)
        if wire is None:
            raise StreamGone
        return wire


class _Reader:
    """One reader of a stream."""

    def __init__(self, record: RequestRecord, stream: ResumableStream, mark: Mark | None) -> None:
        """`mark`: None for the request that begins the stream."""
        self._record = record
        self._stream = stream
        self._mark = mark
        self.position = 0 if mark is None else mark.position
        """Number of the next event."""

    async def chunks(self, max_lag_bytes: int) -> AsyncGenerator[bytes, None]:
        """Events with their ids. The first chunk is empty and lets the headers go out: it is certain that events
        follow."""
        stream, mark, record = self._stream, self._mark, self._record
        transcript = stream.feed.transcript
        with stream.attended():
            if mark is None:
                await stream.begin()
            else:
                await stream.feed.check(mark, _CHECK_WAIT_S)
            seen = 0 if mark is None else transcript.tokens
            yield b""
            yield _RETRY  # a field of the first event, not an event of its own
            recoveries = len(stream.feed.recoveries_s)
            async with aclosing(stream.feed.read(mark or Mark(), max_lag_bytes)) as pieces:
                async for first, events in pieces:
                    if transcript.tokens > seen:
                        record.saw_tokens(transcript.tokens - seen)
                        seen = transcript.tokens
                    if mark is None:  # cached tokens count only for the request with the prompt
                        record.cached_prompt_tokens = transcript.cached_prompt_tokens
                    for seconds in stream.feed.recoveries_s[recoveries:]:
                        yield b": continued on another replica after %.1f s\n" % seconds
                    recoveries = len(stream.feed.recoveries_s)
                    self.position = first + len(events)
                    yield _numbered(stream.id, first, events)
            record.outcome = transcript.outcome


def _stream_id(call: Call) -> str:
    """The one in the path. Raises `ApiError`."""
    stream_id = call.path_params["stream_id"]
    if not _STREAM_ID.fullmatch(stream_id):
        raise bad_request("That is not the id of a stream.", param="stream_id", code="invalid_stream_id")
    return stream_id


def _check_caller(call: Call, stream_id: str, document: StreamDocument) -> None:
    """Raise `ApiError` (404) unless the caller opened the stream."""
    if not is_caller(document.caller, stream_id, call):
        message = "This stream belongs to other credentials; send the Authorization or x-api-key header that opened it."
        raise ApiError(404, message, code="stream_not_found")


def _numbered(stream_id: str, first: int, events: Sequence[Event]) -> bytes:
    """Each event with its id: the stream's, the index of the event after it, and the digest of the text up to it."""
    start = f"id: {stream_id}:".encode()
    return b"".join(
        b"%b%d:%08x\n%b" % (start, index, digest, content) for index, (content, digest) in enumerate(events, first + 1)
    )


def _parse_event_id(last_event_id: str) -> tuple[str, Mark]:
    """(stream id, the reader's mark). Raises `ApiError`."""
    match = _EVENT_ID.fullmatch(last_event_id)
    if match is None:
        message = "Last-Event-ID is not the id of an event of this service."
        raise bad_request(message, param="Last-Event-ID", code="invalid_event_id")
    return match[1], Mark(int(match[2]), None if match[3] is None else int(match[3], 16))
