# Made from asynchronous_http.py by scripts/unasync.py: change that file, then run `make client`.
"""The blocking client's connections over HTTP: requests, retries, and streams that survive a lost connection."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Mapping
from contextlib import closing
from typing import Any

import httpx
from httpx_sse import EventSource

from serve_app.client import protocol
from serve_app.client.documents import Done, Model, ModelOutputDocument, Readiness
from serve_app.client.errors import ConnectionLost, Overloaded, ServeAppError
from serve_app.client.resume import SILENCE_S, Position


class Http:
    """A connection pool to one server."""

    def __init__(
        self,
        base_url: str,
        headers: Mapping[str, str] | None,
        retries: int,
        timeout_s: float,
        transport: httpx.BaseTransport | None,
    ) -> None:
        """See `Client`."""
        self._http = protocol.open_http(httpx.Client, base_url, headers, timeout_s, transport)
        self._retries = retries
        self._timeout_s = timeout_s

    def items(
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

    def models(self) -> tuple[Model, ...]:
        """See `Client`."""
        response = self._send(self._http.build_request("GET", "/v1/models"))
        try:
            with closing(response):
                content = response.read()
        except httpx.TransportError as reason:
            raise protocol.lost(reason, self._http.base_url) from reason
        return protocol.read_models(content)

    def ready(self) -> Readiness:
        """See `Client`."""
        try:
            response = self._http.get("/ready")
        except httpx.TransportError as reason:
            raise protocol.lost(reason, self._http.base_url) from reason
        return protocol.read_readiness(response.status_code, response.content)

    def close(self) -> None:
        """Close the connections, and with them every stream."""
        self._http.close()

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
