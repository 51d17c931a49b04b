# Made from asynchronous.py by scripts/unasync.py: change that file, then run `make client`.
"""The blocking client: `for document in Client().stream(prompt=...)`.

Closing or dropping a stream closes its connection, and with it the work on the server.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, Self, Unpack

import httpx
from httpx_sse import EventSource

from serve_app.client import protocol
from serve_app.client.documents import Completion, Done, Message, Model, ModelOutputDocument, Options, Readiness
from serve_app.client.errors import ConnectionLost, NotReady, Overloaded, ServeAppError, ServerError
from serve_app.client.resume import SILENCE_S, Position


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
        headers: Mapping[str, str] | None = None,
        retries: int = 2,
        timeout_s: float = 600.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """`timeout_s` limits how long the server may send nothing, not how long an answer takes.

        Raises ValueError when `base_url` is not an HTTP URL, or the environment's proxy settings can't be used.
        """
        self._http = protocol.open_http(httpx.Client, base_url, headers, timeout_s, transport)
        self._retries = retries
        self._timeout_s = timeout_s

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
        return Stream(self._items(body, headers, resume=resume))

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
        """The models that the server serves."""
        response = self._send(self._http.build_request("GET", "/v1/models"))
        try:
            with closing(response):
                content = response.read()
        except httpx.TransportError as reason:
            raise protocol.lost(reason, self._http.base_url) from reason
        return protocol.read_models(content)

    def ready(self) -> Readiness:
        """Whether the server can answer now, and how far it is with loading. Raises ConnectionLost without a server."""
        try:
            response = self._http.get("/ready")
        except httpx.TransportError as reason:
            raise protocol.lost(reason, self._http.base_url) from reason
        return protocol.read_readiness(response.status_code, response.content)

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
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _items(
        self, body: dict[str, Any], headers: dict[str, str], *, resume: bool
    ) -> Generator[ModelOutputDocument | Done, None]:
        """The documents of one stream; with `resume`, over as many connections as it takes."""
        position = Position()
        timeout = protocol.timeout(self._timeout_s, SILENCE_S if resume else math.inf)
        send = self._send
        request = self._http.build_request("POST", "/stream", json=body, headers=headers, timeout=timeout)
        while True:
            try:
                response = send(request)
                if resume:
                    position.began(response.headers)
                with closing(self._documents(response, position)) as documents:
                    yield from documents
                return
            except ServeAppError as error:
                pause_s = position.pause_s(error)
                if pause_s is None:
                    raise
            time.sleep(pause_s)
            send = self._send_once  # from here on `position` limits the attempts
            rest_headers = headers | position.headers
            request = self._http.build_request("GET", position.path, headers=rest_headers, timeout=timeout)

    def _documents(self, response: httpx.Response, position: Position) -> Generator[ModelOutputDocument | Done, None]:
        """The documents of one connection. Raises ConnectionLost when it ends before the stream does."""
        request_id = response.headers.get("x-request-id")
        done = False
        source: Any = EventSource(response)  # only one of its two reading methods is typed as a generator
        with closing(response), closing(source.iter_sse()) as events:
            try:
                for event in events:
                    # Read to the end even after the last event, so that the connection can be used again.
                    item = None if done else protocol.read_event(event, request_id)
                    if item is not None and position.take(event.id):
                        done = isinstance(item, Done)
                        yield item
            except httpx.TransportError as reason:
                if not done:
                    raise protocol.lost(reason, self._http.base_url) from reason
        if not done:
            raise protocol.ended_early()

    def _send(self, request: httpx.Request) -> httpx.Response:
        """The response to read from, with status 200. Repeats a request where `protocol.retry_delay_s` allows it."""
        attempt = 0
        while True:
            try:
                return self._send_once(request)
            except (Overloaded, ConnectionLost) as error:
                delay_s = protocol.retry_delay_s(error, attempt, self._retries)
                if delay_s is None:
                    raise
            time.sleep(delay_s)
            attempt += 1

    def _send_once(self, request: httpx.Request) -> httpx.Response:
        try:
            response = self._http.send(request, stream=True)
            if response.status_code == 200:
                return response
            with closing(response):
                content = response.read()
        except httpx.TransportError as reason:
            raise protocol.lost(reason, self._http.base_url) from reason
        raise protocol.error_of(response.status_code, response.headers, content)
