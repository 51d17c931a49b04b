"""Writes a stream of server-sent events: headers, heartbeats, errors in the stream, and a limit for slow readers.

Promises that every chunk is sent as soon as the connection takes it, that events are whole, and that at most
`slow_reader_bytes` are kept for a slow reader. Knows no wire format: events come as bytes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from json import dumps
from json.encoder import encode_basestring

from starlette.types import Receive, Scope, Send

from serve_app.api.errors import ApiError, api_error, internal_error
from serve_app.api.http.body import ClientGone
from serve_app.core import RequestError
from serve_app.observability.logs import request_id_var
from serve_app.resume.refusals import ReaderTooSlow

logger = logging.getLogger(__name__)

HEARTBEAT = b": ping\n"
"""A comment without an empty line after it: openai-python fails on such a line if an event with an id came before."""

_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache, no-transform"),
    (b"x-accel-buffering", b"no"),
)

_PACE_BYTES = 2**18
"""Unsent bytes beyond which a paced stream waits for its client."""

_LINE_ENDS = str.maketrans({"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"})
"""The line ends that JSON does not escape. `str.isprintable` is false for each of them."""


def json_text(text: str) -> str:
    """A string as JSON on one line, quotes included.

    About 0.1 us for a token's text, a tenth of the time of `json.dumps(..., ensure_ascii=False)`.
    """
    quoted = encode_basestring(text)
    return quoted if quoted.isascii() or quoted.isprintable() else one_line(quoted)


def one_line(json: str) -> str:
    """The same JSON with NEL, LS and PS escaped: many clients end a line at these characters, though SSE does not."""
    return json if json.isascii() or json.isprintable() else json.translate(_LINE_ENDS)


def json_line(value: object) -> str:
    """Any value as JSON on one line."""
    return one_line(dumps(value, ensure_ascii=False))


@dataclass(frozen=True, slots=True)
class StreamSettings:
    """The heartbeats of a connection, and its limits for slow readers."""

    heartbeat_s: float = 10.0
    """A heartbeat is sent after this many seconds without an event."""
    slow_reader_bytes: int = 4 * 2**20
    """A stream with more unsent bytes than this is ended with an error. Only bytes in this process count: a proxy that
    accepts everything at once (Serve's) has a buffer of its own."""
    drain_s: float = 30.0
    """Seconds that a client has to read the rest once the stream has ended. Also how long it may read nothing of a
    `paced` stream."""


@dataclass(eq=False)
class EventStream:
    """An ASGI response that sends the events of `chunks`. Closes `chunks` whatever happens."""

    chunks: AsyncGenerator[bytes, None]
    on_error: Callable[[RequestError], bytes]
    """Renders an error that comes after the headers are out."""
    settings: StreamSettings
    headers: Mapping[str, str]
    paced: bool = False
    """Take the next chunk only when the client has read most of the earlier ones. Otherwise all events that a long
    stream already has would count as unread at once."""
    error: ApiError | None = field(default=None, init=False)
    """The error that ended the stream early; None while there is none."""
    _first: bytes = field(default=b"", init=False)

    async def opened(self) -> EventStream:
        """This object, once its first chunk is there. Raises earlier errors, so that they get an HTTP error status."""
        self._first = await anext(self.chunks)
        return self

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream. Raises `ClientGone` when the client takes nothing more.

        The caller must watch `receive`, and cancel this call when the client disconnects.
        """
        async with aclosing(self.chunks):
            headers = [*_HEADERS, *((name.encode(), value.encode()) for name, value in self.headers.items())]
            writer = _Writer(send, headers, self.settings, capped=not self.paced)
            try:
                async with asyncio.TaskGroup() as tasks:
                    sending = tasks.create_task(writer.run(), name="event writer")
                    await self._write_all(writer)
                    await self.chunks.aclose()  # the work ends here, not when a slow client has read the rest
                    writer.end(self.on_error(self.error) if self.error is not None else b"")
                    await asyncio.wait({sending}, timeout=self.settings.drain_s)
                    if not sending.done():
                        raise ClientGone if self.error is None else ClientGone(self.error.outcome)
            except BaseExceptionGroup as group:
                raise group.exceptions[0] from None
            finally:
                writer.close()

    async def _write_all(self, writer: _Writer) -> None:
        try:
            writer.write(self._first)
            async for chunk in self.chunks:
                writer.write(chunk)
                if self.paced:
                    await writer.room()
        except RequestError as error:
            self.error = api_error(error)
        except ClientGone:
            raise
        except Exception:
            self.error = internal_error(request_id_var.get())
            logger.exception("request %s failed in the middle of its stream", request_id_var.get())


class _Writer:
    """Sends in a task of its own, so that the bytes that a slow reader leaves unsent can be counted.

    Chunks that have piled up are sent as one.
    """

    def __init__(
        self, send: Send, headers: list[tuple[bytes, bytes]], settings: StreamSettings, *, capped: bool
    ) -> None:
        """`capped`: `write` raises when too much is unsent. Otherwise its caller must wait for `room`."""
        self._send = send
        self._capped = capped
        self._pace_bytes = min(_PACE_BYTES, settings.slow_reader_bytes // 2)
        self._headers = headers
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._pending: list[bytes] = []
        self._unsent_bytes = 0
        self._more = asyncio.Event()
        self._sent = asyncio.Event()
        self._ended = False
        self._last_write = self._loop.time()
        self._heartbeat = self._loop.call_later(settings.heartbeat_s, self._beat)

    def write(self, chunk: bytes) -> None:
        """Queue a chunk. If a capped writer has too much unsent, forget what is queued and raise `ReaderTooSlow`."""
        if not chunk:
            return
        self._pending.append(chunk)
        self._unsent_bytes += len(chunk)
        if self._capped and self._unsent_bytes > self._settings.slow_reader_bytes:
            self._unsent_bytes -= sum(map(len, self._pending))
            self._pending.clear()
            raise ReaderTooSlow(self._settings.slow_reader_bytes)
        self._last_write = self._loop.time()
        self._more.set()

    async def room(self) -> None:
        """Wait until the client has read most of what was written.

        Raises `ReaderTooSlow` when it reads nothing for `drain_s`.
        """
        while self._unsent_bytes > self._pace_bytes:
            self._sent.clear()
            try:
                async with asyncio.timeout(self._settings.drain_s):
                    await self._sent.wait()
            except TimeoutError:
                raise ReaderTooSlow(self._pace_bytes) from None

    def end(self, last: bytes) -> None:
        """Nothing more will be written after `last`: `run` ends once all is sent."""
        self._pending.append(last)
        self._unsent_bytes += len(last)
        self._ended = True
        self._more.set()

    def close(self) -> None:
        """No more heartbeats."""
        self._heartbeat.cancel()

    async def run(self) -> None:
        """Send until the end. Raises `ClientGone` when the connection has failed."""
        try:
            await self._send({"type": "http.response.start", "status": 200, "headers": self._headers})
            while True:
                await self._more.wait()
                self._more.clear()
                body = b"".join(self._pending)
                self._pending.clear()
                ended = self._ended
                await self._send({"type": "http.response.body", "body": body, "more_body": not ended})
                self._unsent_bytes -= len(body)
                self._sent.set()
                if ended:
                    return
        except OSError as error:
            raise ClientGone from error

    def _beat(self) -> None:
        silent_s = self._loop.time() - self._last_write
        if silent_s >= self._settings.heartbeat_s:
            silent_s = 0.0
            if self._unsent_bytes == 0:
                self.write(HEARTBEAT)
        self._heartbeat = self._loop.call_later(self._settings.heartbeat_s - silent_s, self._beat)
