"""One request to the HTTP application in this process: the answer's headers, then its server-sent events.

gRPC calls go through the application's own middleware, limits and endpoints this way. Promises that the application
sees a disconnect as soon as the caller leaves, and that at most one chunk waits here for a slow caller. Knows no gRPC.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping
from types import TracebackType
from typing import Any, NamedTuple, Self

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message

from serve_app.api.http.endpoint import DOCUMENT, ENDPOINT, EncodedDocument


class Event(NamedTuple):
    """One server-sent event. A comment, such as a heartbeat, is an event without data."""

    name: str
    data: bytes
    id: str


class Exchange:
    """One POST request. Enter it to send the request; leaving it disconnects."""

    def __init__(
        self,
        app: ASGIApp,
        path: str,
        endpoint: str,
        headers: Mapping[str, str],
        document: EncodedDocument,
        client: str | None = None,
    ) -> None:
        """`endpoint`: what metrics and log call it. `client`: the caller's address; None: not known."""
        self._app = app
        self._scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "2",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
            "client": None if client is None else (client, 0),
            "server": None,
            DOCUMENT: document,
            ENDPOINT: endpoint,
        }
        self._sent: deque[Message] = deque()
        self._arrived = asyncio.Event()
        self._taken = asyncio.Event()
        self._left = asyncio.Event()
        self._working: asyncio.Task[None] | None = None
        self.status = 0
        """The answer's HTTP status; 500 if the application has failed without an answer."""
        self.headers = Headers()
        self.complete = False
        """Whether the application has ended the body, and all of it was read."""

    async def __aenter__(self) -> Self:
        self._working = asyncio.create_task(self._app(self._scope, self._receive, self._send), name="request")  # type: ignore[arg-type]
        self._working.add_done_callback(lambda _: self._arrived.set())
        try:
            start = await self._next()
        except BaseException:
            await self._leave()
            raise
        self.status = 500 if start is None else start["status"]
        if start is not None:
            self.headers = Headers(raw=start["headers"])
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._leave()

    async def body(self) -> bytes:
        """The whole body."""
        return b"".join([chunk async for chunk in self._chunks()])

    async def events(self) -> AsyncIterator[Event]:
        """The events of the body, as they come."""
        lines = _EventLines()
        async for chunk in self._chunks():
            for event in lines.push(chunk):
                yield event

    async def _chunks(self) -> AsyncIterator[bytes]:
        while (message := await self._next()) is not None:
            yield message.get("body", b"")
            if not message.get("more_body", False):
                self.complete = True
                return

    async def _next(self) -> Message | None:
        """The next message of the application; None if it ended without one."""
        assert self._working is not None
        while not self._sent:
            if self._working.done():
                return None
            self._arrived.clear()
            await self._arrived.wait()
        self._taken.set()
        return self._sent.popleft()

    async def _receive(self) -> Message:
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        """Returns when there is room for another message. After a disconnect nothing is sent."""
        if self._left.is_set():
            return
        self._sent.append(message)
        self._taken.clear()
        self._arrived.set()
        await self._taken.wait()

    async def _leave(self) -> None:
        assert self._working is not None
        self._left.set()
        self._taken.set()
        await asyncio.wait({self._working})
        if not self._working.cancelled():
            self._working.exception()  # the application's middleware has logged it


class _EventLines:
    """Makes events of a body that comes in pieces."""

    def __init__(self) -> None:
        self._rest = b""
        self._fields: dict[bytes, bytes] = {}

    def push(self, chunk: bytes) -> Iterator[Event]:
        """The events that `chunk` completes."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            if line:
                name, _, value = line.partition(b": ")
                if name:
                    self._fields[name] = value
                else:
                    yield Event("", b"", "")
            elif self._fields:
                fields, self._fields = self._fields, {}
                name = fields.get(b"event", b"message")
                yield Event(name.decode(), fields.get(b"data", b""), fields.get(b"id", b"").decode())
