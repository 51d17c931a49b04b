"""The calls: `Stream` of proto/serve_app.proto, `stream_doc` of Jina's client, and `Check` of gRPC's health service.

A call is a POST /stream to the HTTP application in this process (`exchange`), so gRPC has the same limits, errors, log
lines, metrics and resumable streams. Knows no Ray: Serve and a plain gRPC server call it alike.
"""

from __future__ import annotations

import ipaddress
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any, Protocol
from urllib.parse import unquote

from grpc_health.v1 import health_pb2
from starlette.types import ASGIApp

from serve_app.api.errors import ApiError, body_too_large
from serve_app.api.grpc import documents
from serve_app.api.grpc.exchange import Event, Exchange
from serve_app.api.grpc.refusal import of_answer, of_event, refusal
from serve_app.api.grpc.services import SERVICES, STREAM, STREAM_DOC
from serve_app.api.headers import LAST_EVENT_ID_HEADER, RESUME_HEADER, STREAM_ID_HEADER, TIMEOUT_HEADER
from serve_app.api.http.endpoint import EncodedDocument
from serve_app.api.http.pages import is_loopback
from serve_app.api.limit_headers import OPENAI_NAMES
from serve_app.core import LoadStage, ModelCard, RequestError
from serve_app.proto import jina_pb2, serve_app_pb2

_PATH = "/stream"
_MAX_CHECK_BYTES = 4096
_PASSED_ON = frozenset({"authorization", "x-api-key", "x-request-id", "traceparent", TIMEOUT_HEADER})
_OF_RESUME = frozenset({RESUME_HEADER, LAST_EVENT_ID_HEADER})
"""Metadata of a call that become headers of the request."""
_TRAILING = ("x-request-id", "x-seed", STREAM_ID_HEADER, "x-clamped-fields", *OPENAI_NAMES)
"""Headers of the answer that become trailing metadata of a call."""


class Call(Protocol):
    """What is used of a gRPC context: grpc.aio's and Serve's have it both."""

    def invocation_metadata(self) -> Any:
        """(name, value) pairs, or None."""

    def peer(self) -> str:
        """Such as `ipv4:127.0.0.1:50000`."""

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        """(name, value) pairs that are sent at the end."""


class Servicer:
    """Answers calls with the HTTP application of one ingress."""

    def __init__(
        self, app: ASGIApp, state: Callable[[], Awaitable[ModelCard | LoadStage]], bound_to: str | None = None
    ) -> None:
        """`bound_to`: the host that the service listens on; None: not known.

        Some of Serve's gRPC servers listen on all addresses. If `bound_to` is a loopback address, callers from other
        machines are refused here.
        """
        self._app = app
        self._state = state
        self._local_only = bound_to is not None and is_loopback(bound_to)

    async def stream(self, request: bytes, call: Call) -> AsyncGenerator[serve_app_pb2.ModelOutputDocument, None]:
        """`serve_app.v1.ServeApp/Stream`. Raises `Refusal`."""

        def decode() -> dict[str, Any]:
            self._check_caller(call)
            return documents.read_prompt(request)

        headers = _headers(call, _PASSED_ON | _OF_RESUME)
        document = EncodedDocument(len(request), decode)
        async with self._answer(STREAM, headers, call, document) as answer:
            stream_id, last_id = answer.headers.get(STREAM_ID_HEADER), headers.get(LAST_EVENT_ID_HEADER, "")
            if stream_id and not last_id:
                last_id = f"{stream_id}:0"
                yield serve_app_pb2.ModelOutputDocument(event_id=last_id)
            resumed = LAST_EVENT_ID_HEADER in headers
            async with aclosing(_events(answer, resumed=resumed)) as events:
                async for event in events:
                    last_id = event.id or last_id
                    if event.name:
                        yield documents.answer(event.name, event.data, event.id)
                    elif stream_id:  # a heartbeat
                        yield serve_app_pb2.ModelOutputDocument(event_id=last_id)

    async def stream_doc(self, request: bytes, call: Call) -> AsyncGenerator[jina_pb2.SingleDocumentRequestProto, None]:
        """`jina.JinaSingleDocumentRequestRPC/stream_doc`: one document for each token. Raises `Refusal`."""
        header = jina_pb2.HeaderProto()

        def decode() -> dict[str, Any]:
            self._check_caller(call)
            message = documents.parse(jina_pb2.SingleDocumentRequestProto, request)
            header.CopyFrom(documents.jina_header(message.header))
            return documents.read_jina_prompt(message)

        document = EncodedDocument(len(request), decode)
        async with self._answer(STREAM_DOC, _headers(call, _PASSED_ON), call, document) as answer:
            request_id, number = answer.headers.get("x-request-id", ""), 0
            async with aclosing(_events(answer)) as events:
                async for event in events:
                    if event.name == "message":
                        yield documents.jina_answer(header, f"{request_id}-{number}", documents.token_data(event.data))
                        number += 1

    async def check(self, request: bytes, call: Call) -> health_pb2.HealthCheckResponse:
        """`grpc.health.v1.Health/Check`: whether the model can serve. Raises `Refusal`."""
        try:
            self._check_caller(call)
            if len(request) > _MAX_CHECK_BYTES:
                raise body_too_large(_MAX_CHECK_BYTES)
            service = documents.parse(health_pb2.HealthCheckRequest, request).service
            if service not in SERVICES:
                raise ApiError(404, f"There is no service {service[:100]}.", code="not_found")
        except RequestError as error:
            raise refusal(error) from None
        ready = isinstance(await self._state(), ModelCard)
        kinds = health_pb2.HealthCheckResponse
        return kinds(status=kinds.SERVING if ready else kinds.NOT_SERVING)

    @asynccontextmanager
    async def _answer(
        self, method: str, headers: Mapping[str, str], call: Call, document: EncodedDocument
    ) -> AsyncIterator[Exchange]:
        """The answer, once it has begun. Raises `Refusal`."""
        client = address_of(call.peer())
        async with Exchange(self._app, _PATH, method, headers, document, client) as answer:
            if answer.status >= 400:
                raise of_answer(answer.status, await answer.body(), answer.headers)
            trailing = [(name, answer.headers[name]) for name in _TRAILING if name in answer.headers]
            call.set_trailing_metadata(trailing)
            yield answer

    def _check_caller(self, call: Call) -> None:
        if self._local_only and not is_local(call.peer()):
            message = "This service answers programs on its own machine only; its config sets http_options.host."
            raise ApiError(403, message, code="host_not_allowed")


async def _events(answer: Exchange, *, resumed: bool = False) -> AsyncGenerator[Event, None]:
    """The events and heartbeats of a stream. Raises `Refusal` for an error in it, and if it is cut."""
    request_id = answer.headers.get("x-request-id", "")
    if answer.status == 204:  # a resumed stream of which the caller has everything
        return
    done = False
    async for event in answer.events():  # to the end, also after `done`: else it would count as cut off
        if event.name == "error":
            raise of_event(event.data, request_id)
        yield event
        done = done or event.name == "done"
    # A caller that has all events may ask for more before the end is known, and gets none.
    if done or (answer.complete and resumed):
        return
    message = "The stream was cut before its end; send the request again."
    raise refusal(ApiError(503, message, type="server_error", code="stream_cut"), request_id)


def _headers(call: Call, names: frozenset[str]) -> dict[str, str]:
    metadata = call.invocation_metadata() or ()
    return {name: value for name, value in metadata if name in names and isinstance(value, str)}


def address_of(peer: str) -> str | None:
    """The address in the name that gRPC gives a peer; None where that is not one of the Internet."""
    kind, _, address = unquote(peer).partition(":")
    return address.rpartition(":")[0].strip("[]") if kind in ("ipv4", "ipv6") else None


def is_local(peer: str) -> bool:
    """Whether a peer, as gRPC names it, is on this machine."""
    if peer.startswith("unix:"):
        return True
    try:
        ip = ipaddress.ip_address(address_of(peer) or "")
    except ValueError:
        return False
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return (mapped or ip).is_loopback
