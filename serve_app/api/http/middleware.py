"""The outermost layer: request ids, access lines, metrics, the rules for web pages, API keys, and the handler of
unexpected errors.

Promises that no request passes without a key where one is needed, that every response has the request's id, the names
of fields that were ignored and the CORS headers for pages that may read it, and that no traceback leaves the server.
Knows no endpoint.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Callable
from time import monotonic

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.api.errors import ErrorShape, bad_request, internal_error
from serve_app.api.http.endpoint import CALLER, ERROR_SHAPE, RECORD, error_response
from serve_app.api.http.guard import Guard
from serve_app.api.http.pages import Pages
from serve_app.core import RequestError
from serve_app.observability import metrics as m
from serve_app.observability.logs import NOBODY, AccessLog, RequestRecord, log_access, request_id_var

logger = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
PROBES = frozenset({"/health", "/ready", "/metrics"})
"""Programs call these every few seconds: access lines are at debug level, and the metrics don't count them."""


class RequestScope:
    """Pure ASGI middleware."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: m.MetricsSink,
        pages: Pages,
        guard: Guard,
        error_shape: Callable[[str, Headers], ErrorShape],
    ) -> None:
        """`error_shape`: from a request's path and headers."""
        self._app = app
        self._guard = guard
        self._metrics = metrics
        self._pages = pages
        self._error_shape = error_shape
        self._access_log = AccessLog()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, whatever happens inside."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        path = _without_slash_at_its_end(scope)
        given = headers.get("x-request-id", "")
        record = RequestRecord(given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex)
        scope[RECORD] = record
        scope[ERROR_SHAPE] = self._error_shape(path, headers)
        token = request_id_var.set(record.request_id)
        try:
            await self._guarded(scope, receive, send, record, path)
        finally:
            self._report(record, path)
            request_id_var.reset(token)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send, record: RequestRecord, path: str) -> None:
        headers = Headers(scope=scope)
        method = scope["method"]
        id_header = scope[ERROR_SHAPE].id_header
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                record.status = message["status"]
                answer_headers = MutableHeaders(scope=message)
                answer_headers["x-request-id"] = record.request_id
                if id_header is not None:
                    answer_headers[id_header] = record.request_id
                for name, value in self._pages.answer_headers(headers).items():
                    if name == "vary":
                        answer_headers.add_vary_header(value)
                    else:
                        answer_headers[name] = value
                if record.ignored_fields:
                    answer_headers["x-ignored-fields"] = ", ".join(record.ignored_fields)
                answer_headers.update(record.limit_headers)
                if record.clamped_fields:
                    clamped = (f"{name}={value}" for name, value in record.clamped_fields.items())
                    answer_headers["x-clamped-fields"] = ", ".join(clamped)
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                record.sent_whole()

        try:
            self._pages.check(method, path, headers)
            if (preflight := self._pages.preflight(method, headers)) is not None:
                await preflight(scope, receive, send_with_id)
                return
            scope[CALLER] = caller = self._guard.caller(scope, path, headers)
            if caller.name:
                record.key, record.tenant = caller.name, caller.tenant
            if "x-request-disconnect-disabled" in headers:
                message = "The header x-request-disconnect-disabled is not accepted: work stops when the client leaves."
                raise bad_request(message, code="unsupported_header")
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            if not isinstance(error, RequestError):
                logger.exception("request %s failed", record.request_id)
                error = internal_error(record.request_id)
            answer = error_response(scope, error)
            if not started:
                await answer(scope, receive, send_with_id)

    def _report(self, record: RequestRecord, path: str) -> None:
        if path in PROBES:
            log_access(record, logging.DEBUG)
            return
        self._access_log.ended(record)
        endpoint = {"endpoint": record.endpoint}
        self._metrics.count(m.REQUESTS, 1, {**endpoint, "outcome": record.outcome})
        if record.ignored_fields:
            self._metrics.count(m.IGNORED_FIELDS, len(record.ignored_fields))
        if record.tenant != NOBODY:
            self._report_key(record)
        if record.time_to_first_token_s is not None:
            self._metrics.count(m.PROMPT_TOKENS, record.prompt_tokens)
            self._metrics.count(m.CACHED_PROMPT_TOKENS, record.cached_prompt_tokens)
            self._metrics.count(m.OUTPUT_TOKENS, record.output_tokens)
            self._metrics.observe(m.TIME_TO_FIRST_TOKEN_S, record.time_to_first_token_s, endpoint)
            self._metrics.observe(m.E2E_LATENCY_S, monotonic() - record.arrived, endpoint)
        if record.inter_token_latency_s is not None:
            self._metrics.observe(m.INTER_TOKEN_LATENCY_S, record.inter_token_latency_s, endpoint)

    def _report_key(self, record: RequestRecord) -> None:
        """Names of keys and tenants come from the operator, so there are few of them."""
        of_key = {"tenant": record.tenant, "key": record.key}
        self._metrics.count(m.KEY_REQUESTS, 1, {**of_key, "outcome": record.outcome})
        if record.time_to_first_token_s is not None:
            self._metrics.count(m.KEY_TOKENS, record.prompt_tokens, {**of_key, "kind": "prompt"})
            self._metrics.count(m.KEY_TOKENS, record.output_tokens, {**of_key, "kind": "output"})


def _without_slash_at_its_end(scope: Scope) -> str:
    """Remove the slash at the end of the path in `scope`, but for the application's own root, which is "/".

    Returns the path below the application's own prefix.
    """
    root = scope.get("root_path", "")
    path: str = scope["path"]
    prefix = root if path.startswith(root) else ""
    below = path[len(prefix) :].rstrip("/") or "/"
    scope["path"] = prefix + below
    return below
