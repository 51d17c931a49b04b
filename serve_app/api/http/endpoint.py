"""What every endpoint does around its handler: reads the body, limits the number of requests, turns errors into answers
and watches the connection.

Promises that work stops as soon as its client goes, and that a request beyond the limit is refused at once (P5 and P6
in docs/design.md). Knows no wire format.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

from starlette.datastructures import Headers, QueryParams
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve_app.access.caller import ANONYMOUS, Caller
from serve_app.access.reservations import Quotas, Reservation
from serve_app.api.errors import ErrorShape, api_error, body_too_large
from serve_app.api.http.body import ClientGone, read_json_object
from serve_app.api.http.slow_bodies import SlowBodies, client_of
from serve_app.api.http.sse import EventStream
from serve_app.api.http.time_limit import time_limit_s
from serve_app.config import ApiConfig
from serve_app.core import FailureCode, FinishReason, RequestError
from serve_app.observability.logs import RequestRecord
from serve_app.observability.metrics import REQUESTS_IN_PROGRESS, MetricsSink

CALLER = "serve_app.caller"
"""Where the `Caller` of a request is in the ASGI scope, once its key is checked."""
RECORD = "serve_app.record"
"""Where the request's `RequestRecord` is in the ASGI scope."""
ERROR_SHAPE = "serve_app.error_shape"
"""Where the `ErrorShape` of the request's client is in the ASGI scope."""
DOCUMENT = "serve_app.document"
"""Where a request that did not come as JSON has its `EncodedDocument` in the ASGI scope."""
ENDPOINT = "serve_app.endpoint"
"""Where such a request has the endpoint's name for metrics and log in the ASGI scope."""
INLINE_BYTES = 20_000
"""Size of the largest request that is processed in the event loop: tokenizing so much text takes about 10 ms, every
other step less."""
ITEM_BYTES = 50
"""What one item of a list costs besides its text, in bytes of text that cost as much. It is the cost of a chat message,
which goes through the template."""
INLINE_ENCODED_BYTES = 4_000
"""Size of the largest `EncodedDocument` that is decoded in the event loop. A protobuf field may take 2 bytes, and 5 us
to read: 10 ms."""

_FINISHED = frozenset(map(str, FinishReason))
_FULL = frozenset({FailureCode.OVERLOADED, FailureCode.OVER_SHARE, FailureCode.NOT_READY})
"""Codes of a service that has no room. A request that it refuses before it is counted costs its caller nothing."""

_Result = TypeVar("_Result")


class Counted(Enum):
    """What a request of an endpoint takes of its caller's limits."""

    NOTHING = "nothing"
    """It reads or ends what an earlier request began."""
    REQUEST = "request"
    GENERATION = "generation"
    """A request, tokens and a stream, once its handler knows how many tokens."""


@dataclass(frozen=True, slots=True)
class EncodedDocument:
    """The body of a request that did not come as JSON."""

    size_bytes: int
    decode: Callable[[], dict[str, Any]]
    """The body as a JSON object; called in a thread if the body is large. Raises `RequestError`."""


@dataclass(frozen=True, slots=True)
class Call:
    """One request, as a handler sees it."""

    method: str
    query: QueryParams
    path_params: dict[str, str]
    body: dict[str, Any] | None
    """None for a request without one, such as a GET."""
    headers: Headers
    record: RequestRecord
    deadline: float
    """In seconds, by the event loop's clock."""
    size_bytes: int
    """Of the body, or of the query of a GET."""
    client: str | None = None
    """Who asks, by address; None where that is not known (`slow_bodies.client_of`)."""
    caller: Caller = ANONYMOUS
    """Who asks, by key."""
    reservation: Reservation | None = None
    """What the request takes of its caller's limits; None for a caller without any."""

    async def run(self, work: Callable[[], _Result], *, items: int = 0) -> _Result:
        """Do `work` on this request: in the event loop if the request is small, otherwise in a thread.

        Long work in the loop would hold up every stream of this process. The size of the whole request decides, since
        it is known before its fields are read; `items` is the length of its longest list. A thread helps only with work
        during which other threads can run: Python code, and the tokenizer.
        """
        if self.size_bytes + ITEM_BYTES * items <= INLINE_BYTES:
            return work()
        return await asyncio.to_thread(work)

    def remaining_s(self) -> float:
        """Seconds left of the request's time."""
        return self.deadline - asyncio.get_running_loop().time()


Handler = Callable[[Call], Awaitable[Response | EventStream]]


def error_response(scope: Scope, error: RequestError) -> Response:
    """The answer for an error, in the shape that the request's client reads. The request's record gets the outcome."""
    answer = api_error(error)
    record: RequestRecord = scope[RECORD]
    shape: ErrorShape = scope[ERROR_SHAPE]
    record.outcome = answer.outcome
    return answer.response(shape, record.request_id)


class Admission:
    """Limits how many requests this process answers at a time."""

    def __init__(self, max_streams: int, metrics: MetricsSink) -> None:
        self._max_streams = max_streams
        self._metrics = metrics
        self._in_progress = 0
        self.slow_bodies = SlowBodies()
        """Requests whose bodies arrive slowly. They have none of the places yet."""

    def refuse_when_full(self) -> None:
        """Raise `RequestError` when all places are taken."""
        if self._in_progress >= self._max_streams:
            message = f"The server is at its limit of {self._max_streams} requests; try again in a moment."
            raise RequestError(message, code=FailureCode.OVERLOADED)

    @contextmanager
    def place(self) -> Iterator[None]:
        """One of the places, for as long as the block runs. Raises `RequestError` when all are taken."""
        self.refuse_when_full()
        self._in_progress += 1
        self._metrics.gauge(REQUESTS_IN_PROGRESS, self._in_progress)
        try:
            yield
        finally:
            self._in_progress -= 1
            self._metrics.gauge(REQUESTS_IN_PROGRESS, self._in_progress)


class Endpoint:
    """An ASGI application around one handler."""

    def __init__(
        self,
        name: str,
        handler: Handler,
        admission: Admission,
        config: ApiConfig,
        *,
        get_with_body: bool = False,
        reads_body: bool = True,
        quotas: Quotas | None = None,
        counted: Counted = Counted.NOTHING,
    ) -> None:
        """`name`: what metrics and log call the endpoint. `get_with_body`: the body of a GET is read, if it has one.
        `reads_body`: a POST must have one. `counted`: against the limits in `quotas`."""
        self._quotas = quotas
        self._counted = counted
        self._reads_body = reads_body
        self._name = name
        self._get_with_body = get_with_body
        self._handler = handler
        self._admission = admission
        self._config = config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; errors of the request become answers here."""
        record: RequestRecord = scope[RECORD]
        record.endpoint = scope.get(ENDPOINT, self._name)
        arrived = asyncio.get_running_loop().time()
        reservation: Reservation | None = None
        try:
            deadline = arrived + time_limit_s(Headers(scope=scope), self._config.request_timeout_s)
            self._admission.refuse_when_full()
            reservation = self._reservation(scope)
            # Before taking a place: a client that sends no body must not hold one.
            body, size_bytes = await self._body(scope, receive)
            with self._admission.place():
                query = QueryParams(scope["query_string"])
                path_params = scope.get("path_params", {})
                headers = Headers(scope=scope)
                client = client_of(scope["client"][0]) if scope.get("client") else None
                call = Call(
                    scope["method"], query, path_params, body, headers, record, deadline, size_bytes, client,
                    scope.get(CALLER, ANONYMOUS), reservation,
                )  # fmt: skip
                await _while_connected(receive, self._answer(call, scope, receive, send))
        except RequestError as refusal:
            if reservation is not None and refusal.code in _FULL:
                reservation.costs_nothing()
            _note_limits(scope, reservation)
            await error_response(scope, refusal)(scope, receive, send)
        except ClientGone as gone:
            record.outcome = gone.outcome
        finally:
            if reservation is not None:
                reservation.end(_used_tokens(record))

    def _reservation(self, scope: Scope) -> Reservation | None:
        if self._quotas is None or self._counted is Counted.NOTHING:
            return None
        return self._quotas.reservation(scope.get(CALLER, ANONYMOUS))

    async def _body(self, scope: Scope, receive: Receive) -> tuple[dict[str, Any] | None, int]:
        """The body as a JSON object, and its size in bytes; where none is read, None and the size of the query."""
        limit = self._config.max_body_bytes
        encoded: EncodedDocument | None = scope.get(DOCUMENT)
        if encoded is not None:
            return await _decoded(encoded, limit), encoded.size_bytes
        must_have = scope["method"] == "POST" and self._reads_body
        if must_have or (self._get_with_body and _has_body(Headers(scope=scope))):
            return await read_json_object(scope, receive, limit, self._admission.slow_bodies)
        return None, len(scope["query_string"])

    async def _answer(self, call: Call, scope: Scope, receive: Receive, send: Send) -> None:
        if call.reservation is not None and self._counted is Counted.REQUEST:
            await call.reservation.take()
        response = await self._handler(call)
        _note_limits(scope, call.reservation)
        await response(scope, receive, send)
        if isinstance(response, EventStream) and response.error is not None:
            call.record.outcome = response.error.outcome


def _note_limits(scope: Scope, reservation: Reservation | None) -> None:
    """Let the answer tell what is left of the caller's limits."""
    if reservation is not None:
        shape: ErrorShape = scope[ERROR_SHAPE]
        scope[RECORD].limit_headers = shape.limit_headers(reservation)


def _used_tokens(record: RequestRecord) -> int:
    """What the request has used. One that ended before its first token has used nothing."""
    began = record.output_tokens or record.outcome in _FINISHED
    return record.prompt_tokens + record.output_tokens if began else 0


async def _decoded(document: EncodedDocument, max_bytes: int) -> dict[str, Any]:
    if document.size_bytes > max_bytes:
        raise body_too_large(max_bytes)
    if document.size_bytes <= INLINE_ENCODED_BYTES:
        return document.decode()
    return await asyncio.to_thread(document.decode)


def _has_body(headers: Headers) -> bool:
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


async def _while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do `work`; cancel it as soon as the client goes, and raise `ClientGone` then."""
    working = asyncio.create_task(work, name="request")
    watching = asyncio.create_task(_disconnected(receive), name="disconnect watcher")
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.wait({working, watching})
    if not watching.cancelled():
        watching.result()
    if working.cancelled():
        raise ClientGone
    working.result()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
