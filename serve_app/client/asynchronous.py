"""The asynchronous client: `async for document in AsyncClient().stream(prompt=...)`.

Closing a stream, or cancelling its task, closes its connection, and with it the work on the server.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Self, Unpack

import httpx

from serve_app.client import protocol
from serve_app.client.asynchronous_http import AsyncHttp
from serve_app.client.documents import Completion, Done, Message, Model, ModelOutputDocument, Options, Readiness
from serve_app.client.errors import NotReady, ServerError

if TYPE_CHECKING:
    from serve_app.client.asynchronous_grpc import AsyncGrpc


class AsyncStream(AsyncIterator[ModelOutputDocument]):
    """One answer, document by document. The request is sent when the first document is asked for.

    Raises the errors of `serve_app.client.errors` while it is iterated. To leave the loop early, iterate
    inside `async with client.stream(...) as stream` or call `aclose()`: that ends the work on the server at once.
    """

    def __init__(self, items: AsyncGenerator[ModelOutputDocument | Done, None]) -> None:
        self._items = items
        self.done: Done | None = None
        """Finish reason, usage and seed: set once the stream has ended well."""

    async def __anext__(self) -> ModelOutputDocument:
        async for item in self._items:
            if isinstance(item, ModelOutputDocument):
                return item
            self.done = item
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """End the stream, and the work on the server. Safe to repeat."""
        await self._items.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class AsyncClient:
    """A connection pool to one server, for the tasks of one event loop."""

    def __init__(
        self,
        base_url: str = protocol.DEFAULT_URL,
        *,
        api_key: str | None = None,
        headers: Mapping[str, str] | None = None,
        retries: int = 2,
        timeout_s: float = 600.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """`base_url`: `http://`, `https://`, or for gRPC `grpc://host:port` and with TLS `grpcs://host:port`.

        `api_key`: by default that in the environment variable SERVE_APP_API_KEY, if there is one; "": none.
        `timeout_s` limits how long the server may send nothing over HTTP, and how long an answer may take over gRPC.
        Raises ValueError when `base_url` is no such URL, or the environment's proxy settings can't be used.
        """
        headers = protocol.with_key(headers, api_key)
        self._connections: AsyncHttp | AsyncGrpc
        if base_url.startswith(protocol.GRPC_SCHEMES):
            from serve_app.client.asynchronous_grpc import AsyncGrpc  # imported here: grpc takes 0.1 s

            self._connections = AsyncGrpc(base_url, headers, retries, timeout_s)
        else:
            self._connections = AsyncHttp(base_url, headers, retries, timeout_s, transport)

    def stream(
        self,
        *,
        prompt: str | None = None,
        messages: Sequence[Message] | None = None,
        request_id: str | None = None,
        resume: bool = False,
        **options: Unpack[Options],
    ) -> AsyncStream:
        """Stream the continuation of `prompt` or the answer to `messages` (exactly one of them).

        `resume`: after a lost connection go on where the stream was; every document still comes once. With it the
        server also generates for a while (`streams.grace_s`) after the stream was closed here.
        """
        body = protocol.stream_body(prompt, messages, options)
        headers = protocol.request_headers(request_id, resume=resume)
        return AsyncStream(self._connections.items(body, headers, resume=resume))

    async def complete(
        self,
        *,
        prompt: str | None = None,
        messages: Sequence[Message] | None = None,
        request_id: str | None = None,
        resume: bool = False,
        **options: Unpack[Options],
    ) -> Completion:
        """The whole answer that `stream` would give in pieces."""
        async with self.stream(
            prompt=prompt, messages=messages, request_id=request_id, resume=resume, **options
        ) as stream:
            documents = [document async for document in stream]
        if stream.done is None:
            raise protocol.ended_early()
        return protocol.joined(documents, stream.done)

    async def models(self) -> tuple[Model, ...]:
        """The models that the server serves. Raises ServeAppError over gRPC, which has no call for that."""
        return await self._connections.models()

    async def ready(self) -> Readiness:
        """Whether the server can answer now, and over HTTP how far it is with loading.

        Raises ConnectionLost without a server.
        """
        return await self._connections.ready()

    async def wait_until_ready(
        self, timeout_s: float = 600.0, poll_s: float = 0.5, progress: Callable[[Readiness], None] | None = None
    ) -> Readiness:
        """Ask every `poll_s` seconds until the server is ready; `progress` is called with every answer.

        Raises NotReady when `timeout_s` has passed, ServerError when loading failed for good, and ConnectionLost
        when nothing listens at the address.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            state = await self.ready()
            if progress is not None:
                progress(state)
            if state.ready:
                return state
            if state.error is not None:
                raise ServerError(state.error, status=503)
            if time.monotonic() + poll_s > deadline:
                raise NotReady(f"not ready after {timeout_s:g} s: {state.stage or 'starting'}", status=503)
            await asyncio.sleep(poll_s)

    async def aclose(self) -> None:
        """Close the connections, and with them every stream."""
        await self._connections.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
