"""What the sync and the async client share: requests, answers, errors and retries, without doing any I/O.

Promises that a retry happens only while nothing has been delivered, a bounded number of times, and as the server asks.
"""

from __future__ import annotations

import ipaddress
import json
import math
import os
import random
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx
from httpx_sse import ServerSentEvent, SSEError

from serve_app.client.documents import Completion, Done, Message, Model, ModelOutputDocument, Options, Readiness
from serve_app.client.errors import (
    APIError,
    AuthenticationError,
    BadRequest,
    ConnectionLost,
    ContextLengthExceeded,
    NotReady,
    Overloaded,
    PermissionDenied,
    ServeAppError,
    ServerError,
    StreamError,
)

KEY_VARIABLE = "SERVE_APP_API_KEY"
"""Environment variable: the API key, where a client is given none."""
DEFAULT_URL = "http://127.0.0.1:8000"
GRPC_SCHEMES = ("grpc://", "grpcs://")
CONNECT_TIMEOUT_S = 5.0
LONGEST_RETRY_AFTER_S = 30.0  # for a longer Retry-After the error is raised at once
FIRST_BACKOFF_S = 0.25
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")

Http = TypeVar("Http", httpx.Client, httpx.AsyncClient)


def open_http(
    kind: type[Http], base_url: str, headers: Mapping[str, str] | None, timeout_s: float, transport: Any
) -> Http:
    """A client of httpx. Raises ValueError when `base_url` is no HTTP URL or the proxy settings can't be used."""
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{base_url!r} is not an address; write e.g. {DEFAULT_URL}")
    try:
        return kind(
            base_url=base_url,
            headers=headers,
            timeout=timeout(timeout_s),
            trust_env=not is_loopback(parts.hostname),  # a proxy for the outside can't reach this machine's loopback
            transport=transport,
        )
    except (ImportError, ValueError, httpx.InvalidURL) as reason:
        names = ", ".join(name for name in _PROXIES if os.environ.get(name) or os.environ.get(name.lower()))
        raise ValueError(
            f"the proxy settings of the environment ({names}) can't be used: {reason} Correct or unset them."
        ) from reason


def with_key(headers: Mapping[str, str] | None, api_key: str | None) -> dict[str, str]:
    """`headers` with the API key as a bearer token; None: the key in the environment, if there is one.

    Headers that already present a key stay as they are.
    """
    given = dict(headers or {})
    key = os.environ.get(KEY_VARIABLE, "").strip() if api_key is None else api_key
    if key and not {"authorization", "x-api-key"} & {name.lower() for name in given}:
        given["Authorization"] = f"Bearer {key}"
    return given


def is_loopback(host: str) -> bool:
    """Whether this host is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def timeout(timeout_s: float, silence_s: float = math.inf) -> httpx.Timeout:
    """The timeout of one request: `timeout_s` for each step except connecting; `silence_s` to read, if that is less."""
    return httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S, read=min(timeout_s, silence_s))


def stream_body(prompt: str | None, messages: Sequence[Message] | None, options: Options) -> dict[str, Any]:
    """The PromptDocument; whatever is None is left out, so that the server's defaults hold."""
    body: dict[str, Any] = {"prompt": prompt, "messages": None if messages is None else list(messages), **options}
    return {name: value for name, value in body.items() if value is not None}


def request_headers(request_id: str | None, *, resume: bool) -> dict[str, str]:
    """`X-Request-Id` when the caller chose one, and `X-Stream-Resume` when the stream shall be resumable."""
    headers = {} if request_id is None else {"X-Request-Id": request_id}
    return headers | {"X-Stream-Resume": "1"} if resume else headers


def read_event(event: ServerSentEvent, request_id: str | None) -> ModelOutputDocument | Done | None:
    """What an event of /stream means; None for one that this client does not know. Raises StreamError on an error.

    httpx-sse yields an event without data for a comment, such as a heartbeat, that follows an id; it is ignored.
    """
    if not event.data or event.event not in ("message", "done", "error"):
        return None
    try:
        body = json.loads(event.data)
    except ValueError as reason:
        raise ServerError(f"an event of the stream is not JSON: {event.data[:80]!r}", request_id=request_id) from reason
    if not isinstance(body, dict):
        raise ServerError(f"an event of the stream is not an object: {event.data[:80]!r}", request_id=request_id)
    if event.event == "error" or "error" in body:
        message, code = _message_and_code(body)
        raise StreamError(message or "the stream failed", code=code, request_id=request_id)
    return Done.parse(body) if event.event == "done" else ModelOutputDocument.parse(body)


def joined(documents: Sequence[ModelOutputDocument], done: Done) -> Completion:
    """A whole answer from its documents.

    Text that became certain only as the answer ended comes in one more document, which repeats the last token's id.
    """
    text = "".join(document.generated_text for document in documents)
    token_ids = tuple(document.token_id for document in documents[: done.usage.completion_tokens])
    return Completion(text, token_ids, done)


def read_models(content: bytes) -> tuple[Model, ...]:
    """The models in the answer of /v1/models. Raises ServerError when the answer is not a list of models."""
    entries = _json_object(content).get("data")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ServerError("the server's /v1/models is not a list of models; is this a serve_app?")
    return tuple(Model.parse(entry) for entry in entries)


def read_readiness(status: int, content: bytes) -> Readiness:
    """The answer of /ready: 200 when ready, 503 with the stage before.

    A 503 with the API's error object comes from a proxy without an application yet: it gives no stage and no failure.
    """
    body = _json_object(content)
    if status in (401, 403, 429):
        raise error_of(status, {}, content)
    if status not in (200, 503) or not body:
        message, _ = _message_and_code(body)
        raise ServerError(f"/ready answered {status}; {message or 'is this a serve_app?'}", status=status)
    fraction, error = body.get("fraction"), body.get("error")
    return Readiness(
        ready=status == 200,
        stage=str(body.get("stage") or ""),
        fraction=float(fraction) if isinstance(fraction, int | float) else None,
        error=error if isinstance(error, str) else None,
        details=body,
    )


_REFUSALS: Mapping[int, type[APIError]] = {401: AuthenticationError, 403: PermissionDenied}


def error_of(status: int, headers: Mapping[str, str], content: bytes) -> APIError:
    """The typed error for an answer that is not 200."""
    message, code = _message_and_code(_json_object(content))
    kind: type[APIError] = ServerError
    if status in (429, 503):
        kind = NotReady if code == "not_ready" else Overloaded
    elif 400 <= status < 500:
        kind = _REFUSALS.get(status, BadRequest)
        kind = ContextLengthExceeded if code == "context_length_exceeded" else kind
    return kind(
        message or f"the server answered {status}",
        status=status,
        code=code,
        request_id=headers.get("x-request-id"),
        retry_after_s=_seconds(headers.get("retry-after")),
    )


def lost(reason: httpx.TransportError, base_url: httpx.URL) -> ConnectionLost | ServerError:
    """The typed error for a connection that failed, or that carries no event stream."""
    if isinstance(reason, SSEError):
        return ServerError(f"the server at {base_url} did not answer with a stream; is this a serve_app? ({reason})")
    if isinstance(reason, httpx.ConnectError | httpx.ConnectTimeout):
        return ConnectionLost(f"no server answers at {base_url} ({reason})")
    if isinstance(reason, httpx.TimeoutException):
        return ConnectionLost(f"the server at {base_url} has been silent for too long ({type(reason).__name__})")
    return ConnectionLost(f"the connection to {base_url} was lost ({reason or type(reason).__name__})")


def ended_early() -> ConnectionLost:
    """The typed error for a stream whose bytes ended before its last event."""
    return ConnectionLost("the stream ended before its last event; the server or something between has closed it")


def retry_delay_s(error: Overloaded | ConnectionLost, attempt: int, retries: int) -> float | None:
    """Seconds to wait before attempt number `attempt` + 1 (the first is 0), or None to give up.

    Only for errors before the first delivered byte. Refusals by a full or loading server and failed connections are
    retried. Timeouts are not, since the server may be at work on the request.
    """
    if attempt >= retries or isinstance(error.__cause__, httpx.TimeoutException):
        return None
    return backoff_s(error, attempt + 1, FIRST_BACKOFF_S, LONGEST_RETRY_AFTER_S)


def backoff_s(error: ServeAppError, failures: int, first_s: float, longest_s: float) -> float | None:
    """Seconds to wait after that many `failures` in a row (from 1), the last of them `error`.

    The server's Retry-After counts first; None when it is longer than LONGEST_RETRY_AFTER_S. Without one, the time
    doubles from `first_s` up to `longest_s`, with a random factor between 0.5 and 1.5.
    """
    if isinstance(error, Overloaded) and error.retry_after_s is not None:
        return error.retry_after_s if error.retry_after_s <= LONGEST_RETRY_AFTER_S else None
    return random.uniform(0.5, 1.5) * min(longest_s, first_s * 2.0 ** min(failures - 1, 30))


def _message_and_code(body: Mapping[str, Any]) -> tuple[str | None, str | None]:
    error = body.get("error")
    if not isinstance(error, dict):
        return None, None
    message, code = error.get("message"), error.get("code")
    return (message if isinstance(message, str) else None), (code if isinstance(code, str) else None)


def _json_object(content: bytes) -> dict[str, Any]:
    """The JSON object in `content`; empty for anything else, such as a proxy's error page."""
    try:
        body = json.loads(content)
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _seconds(value: str | None) -> float | None:
    """`Retry-After` in seconds; its HTTP-date form is not sent by serve_app and counts as absent."""
    try:
        seconds = float(value) if value is not None else None
    except ValueError:
        return None
    return seconds if seconds is not None and 0 <= seconds < float("inf") else None
