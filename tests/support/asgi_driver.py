"""Plays a web server for one request, so that a test decides when the client reads, and when it goes."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.types import ASGIApp, Message


class Exchange:
    """One request to an ASGI application, running in a task."""

    def __init__(self, app: ASGIApp, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None):
        path, _, query = path.partition("?")
        self._scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "scheme": "http",
            "headers": [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        content = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else b""
        self._incoming: asyncio.Queue[Message] = asyncio.Queue()
        self._incoming.put_nowait({"type": "http.request", "body": content, "more_body": False})
        self.sent: list[Message] = []
        self.changed = asyncio.Condition()
        self.reading = asyncio.Event()
        """Cleared: the client takes nothing, and `send` waits as uvicorn's does."""
        self.reading.set()
        self.send_error: Exception | None = None
        """What `send` raises from now on."""
        self.task = asyncio.create_task(app(self._scope, self._receive, self._send))

    async def _receive(self) -> Message:
        return await self._incoming.get()

    async def _send(self, message: Message) -> None:
        if self.send_error is not None:
            raise self.send_error
        async with self.changed:
            self.sent.append(message)
            self.changed.notify_all()
        await self.reading.wait()

    def disconnect(self) -> None:
        """The client goes."""
        self._incoming.put_nowait({"type": "http.disconnect"})

    @property
    def status(self) -> int | None:
        """Of the response, once it has begun."""
        return self.sent[0]["status"] if self.sent else None

    @property
    def body(self) -> bytes:
        """All that was sent so far."""
        return b"".join(message.get("body", b"") for message in self.sent[1:])

    @property
    def complete(self) -> bool:
        """Whether the response has ended as it should."""
        return bool(self.sent) and self.sent[-1].get("more_body") is False

    async def until(self, text: bytes) -> None:
        """Wait until `text` was sent."""
        async with asyncio.timeout(60), self.changed:
            await self.changed.wait_for(lambda: text in self.body)

    async def end(self) -> None:
        """Wait until the application has returned."""
        async with asyncio.timeout(60):
            await self.task
