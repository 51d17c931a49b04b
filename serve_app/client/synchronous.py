# Made from asynchronous.py by scripts/unasync.py: change that file, then run `make client`.
"""The blocking client: `for document in Client().stream(prompt=...)`.

Closing or dropping a stream closes its connection, and with it the work on the server.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Self, Unpack

import httpx

from serve_app.client import protocol
from serve_app.client.documents import Completion, Done, Message, Model, ModelOutputDocument, Options, Readiness
from serve_app.client.errors import NotReady, ServerError
from serve_app.client.synchronous_http import Http

if TYPE_CHECKING:
    from serve_app.client.synchronous_grpc import Grpc


class Stream(Iterator[ModelOutputDocument]):
    """One answer, document by document. The request is sent when the first document is asked for.

    Raises the errors of `serve_app.client.errors` while it is iterated. To leave the loop early, iterate
    inside `with client.stream(...) as stream` or call `close()`: that ends the work on the server at once.
    """

    def __init__(self, items: Generator[ModelOutputDocument | Done, None]) -> None:
        self._items = items
        self.done: Done | None = None
        """Finish reason, usage and seed: set once the stream has ended well."""

    def __next__(self) -> ModelOutputDocument:
        for item in self._items:
            if isinstance(item, ModelOutputDocument):
                return item
            self.done = item
        raise StopIteration

    def close(self) -> None:
        """End the stream, and the work on the server. Safe to repeat."""
        self._items.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Client:
    """A connection pool to one server, which threads may share; each stream belongs to one thread."""

    def __init__(
        self,
        base_url: str = protocol.DEFAULT_URL,
        *,
        api_key: str | None = None,
        headers: Mapping[str, str] | None = None,
        retries: int = 2,
        timeout_s: float = 600.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """`base_url`: `http://`, `https://`, or for gRPC `grpc://host:port` and with TLS `grpcs://host:port`.

        `api_key`: by default that in the environment variable SERVE_APP_API_KEY, if there is one; "": none.
        `timeout_s` limits how long the server may send nothing over HTTP, and how long an answer may take over gRPC.
        Raises ValueError when `base_url` is no such URL, or the environment's proxy settings can't be used.
        """
        headers = protocol.with_key(headers, api_key)
        self._connections: Http | Grpc
        if base_url.startswith(protocol.GRPC_SCHEMES):
            from serve_app.client.synchronous_grpc import Grpc  # imported here: grpc takes 0.1 s

            self._connections = Grpc(base_url, headers, retries, timeout_s)
        else:
            self._connections = Http(base_url, headers, retries, timeout_s, transport)

    def stream(
        self,
        *,
        prompt: str | None = None,
        messages: Sequence[Message] | None = None,
        request_id: str | None = None,
        resume: bool = False,
        **options: Unpack[Options],
    ) -> Stream:
        """Stream the continuation of `prompt` or the answer to `messages` (exactly one of them).

        `resume`: after a lost connection go on where the stream was; every document still comes once. With it the
        server also generates for a while (`streams.grace_s`) after the stream was closed here.
        """
        body = protocol.stream_body(prompt, messages, options)
        headers = protocol.request_headers(request_id, resume=resume)
        return Stream(self._connections.items(body, headers, resume=resume))

    def complete(
        self,
        *,
        prompt: str | None = None,
        messages: Sequence[Message] | None = None,
        request_id: str | None = None,
        resume: bool = False,
        **options: Unpack[Options],
    ) -> Completion:
        """The whole answer that `stream` would give in pieces."""
        with self.stream(prompt=prompt, messages=messages, request_id=request_id, resume=resume, **options) as stream:
            documents = list(stream)
        if stream.done is None:
            raise protocol.ended_early()
        return protocol.joined(documents, stream.done)

    def models(self) -> tuple[Model, ...]:
        """The models that the server serves. Raises ServeAppError over gRPC, which has no call for that."""
        return self._connections.models()

    def ready(self) -> Readiness:
        """Whether the server can answer now, and over HTTP how far it is with loading.

        Raises ConnectionLost without a server.
        """
        return self._connections.ready()

    def wait_until_ready(
        self, timeout_s: float = 600.0, poll_s: float = 0.5, progress: Callable[[Readiness], None] | None = None
    ) -> Readiness:
        """Ask every `poll_s` seconds until the server is ready; `progress` is called with every answer.

        Raises NotReady when `timeout_s` has passed, ServerError when loading failed for good, and ConnectionLost
        when nothing listens at the address.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            state = self.ready()
            if progress is not None:
                progress(state)
            if state.ready:
                return state
            if state.error is not None:
                raise ServerError(state.error, status=503)
            if time.monotonic() + poll_s > deadline:
                raise NotReady(f"not ready after {timeout_s:g} s: {state.stage or 'starting'}", status=503)
            time.sleep(poll_s)

    def close(self) -> None:
        """Close the connections, and with them every stream."""
        self._connections.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
