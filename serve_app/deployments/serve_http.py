"""What Serve's own HTTP servers answer in place of an application, and how long they wait for headers; where its gRPC
servers listen.

Serve calls `middlewares` in each of its Python proxies and ingress replicas, where the environment variable
RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names it. Promises errors in the API's form.
"""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http import auto

from serve_app.api.error_shapes import error_shape
from serve_app.api.errors import INVALID_REQUEST, SERVER_ERROR, ApiError
from serve_app.deployments.logs import leave_out_refusals
from serve_app.deployments.ray_internals import keep_grpc_on_http_host

HEADER_TIMEOUT_S = 10.0
"""How long a new connection may take for its first request's headers. uvicorn waits for ever."""
_API_ROOT = "/v1/"
_RETRY_AFTER_S = 1.0
_ANSWERS = {
    404: ("Nothing is served at this path.", "not_found"),
    408: ("The request was not answered in the time that Serve is set to wait.", "deadline_exceeded"),
    429: ("Too many requests wait for an answer; try again in a moment.", "overloaded"),
    503: ("No server can take this request at the moment; send it again.", "overloaded"),
}
"""Status -> (message, code). They replace Serve's own texts, which name its internals and its exceptions."""


def middlewares() -> list[Middleware]:
    """The middleware for Serve's HTTP servers. Those that this process starts from now on use `BoundedProtocol`.

    Its gRPC servers listen on the same host.
    """
    keep_grpc_on_http_host()
    leave_out_refusals()
    if not issubclass(auto.AutoHTTPProtocol, BoundedProtocol):
        auto.AutoHTTPProtocol = type("BoundedHTTPProtocol", (BoundedProtocol, auto.AutoHTTPProtocol), {})
    return [Middleware(JsonErrors)]


class JsonErrors:
    """ASGI middleware: turns Serve's errors, which are in plain text, into the API's form."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; Serve's own endpoints below /-/ are left alone."""
        if scope["type"] != "http" or scope["path"].startswith("/-/"):
            await self._app(scope, receive, send)
            return
        replaced = False

        async def send_json(message: Message) -> None:
            nonlocal replaced
            if message["type"] == "http.response.start" and message["status"] >= 400:
                headers = Headers(raw=message["headers"])
                if headers.get("content-type", "").startswith("text/plain"):
                    replaced = True
                    shape = error_shape(_below_prefix(scope["path"]), Headers(scope=scope))
                    request_id = headers.get("x-request-id", "")
                    answer = _error(message["status"], headers).response(shape, request_id)
                    if shape.id_header is not None and request_id:
                        answer.headers[shape.id_header] = request_id
                    await answer(scope, receive, send)
            if not replaced:
                await send(message)

        await self._app(scope, receive, send_json)


class BoundedProtocol(asyncio.Protocol):
    """Mixed into uvicorn's protocol, whose attributes it uses: bounds the wait for headers, and refuses with JSON."""

    cycle: Any
    transport: asyncio.Transport
    _headers_due: asyncio.TimerHandle

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to wait for headers."""
        super().connection_made(transport)
        self._headers_due = asyncio.get_running_loop().call_later(HEADER_TIMEOUT_S, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting for headers."""
        self._headers_due.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls when it can't read a request; `msg` is its text."""
        self._refuse(ApiError(400, "The request is not valid HTTP.", code="invalid_http"), "400 Bad Request")

    def _give_up(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            message = f"The request did not arrive within {HEADER_TIMEOUT_S:g} s."
            self._refuse(ApiError(408, message, code="request_timeout"), "408 Request Timeout")

    def _refuse(self, error: ApiError, status: str) -> None:
        body = error.body()
        head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self.transport.close()


def _below_prefix(path: str) -> str:
    """The path without the prefix of an application. Serve, which answers here, does not say where it ends."""
    return path[max(path.rfind(_API_ROOT), 0) :]


def _error(status: int, headers: Headers) -> ApiError:
    message, code = _ANSWERS.get(status, ("The server made a mistake.", "internal_error"))
    retry_after_s = _RETRY_AFTER_S if status in (429, 503) else None
    given = headers.get("retry-after", "")
    if given.isdecimal():
        retry_after_s = float(given)
    kept = {name: headers[name] for name in ("x-request-id",) if name in headers}
    kind = SERVER_ERROR if status >= 500 else INVALID_REQUEST
    return ApiError(status, message, type=kind, code=code, retry_after_s=retry_after_s, headers=kept)
