"""What an error looks like to a client: one table from codes to HTTP statuses, and OpenAI's error object.

    RequestError      raised anywhere in the service: `api_error` looks up its HTTP status by its code
    └── ApiError      raised by the API itself: it has its HTTP status

An `ErrorShape` writes an error for the clients of one wire format; OpenAI's is here.

Promises that no traceback, path or prompt leaves the server. Knows no endpoint.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pydantic import ValidationError
from starlette.responses import Response

from serve_app.access.reservations import CODE, LimitReached, Reservation
from serve_app.api.limit_headers import openai_headers
from serve_app.core import FailureCode, RequestError

INVALID_REQUEST = "invalid_request_error"
SERVER_ERROR = "server_error"

_STATUSES: Mapping[str, tuple[int, str]] = {
    FailureCode.OVERLOADED: (503, SERVER_ERROR),
    FailureCode.OVER_SHARE: (429, "requests"),
    FailureCode.NOT_READY: (503, SERVER_ERROR),
    FailureCode.WRONG_WEIGHTS: (503, SERVER_ERROR),
    FailureCode.DEADLINE_EXCEEDED: (504, SERVER_ERROR),
    FailureCode.REPLICA_LOST: (503, SERVER_ERROR),
    FailureCode.POISON: (500, SERVER_ERROR),
    FailureCode.ENGINE_FAILED: (500, SERVER_ERROR),
    FailureCode.CANCELLED: (409, INVALID_REQUEST),
    "journal_unavailable": (503, SERVER_ERROR),
    "model_not_allowed": (403, INVALID_REQUEST),
    "model_not_found": (404, INVALID_REQUEST),
    CODE: (429, "requests"),
    "slow_reader": (408, INVALID_REQUEST),
    "stream_changed": (410, INVALID_REQUEST),
    "stream_gone": (410, INVALID_REQUEST),
}
"""(HTTP status, OpenAI's error type) by code. Any other code is 400: the request itself is wrong."""
_RETRIED = frozenset(
    {FailureCode.OVERLOADED, FailureCode.OVER_SHARE, FailureCode.WRONG_WEIGHTS, FailureCode.REPLICA_LOST}
)
"""Codes of errors that are usually over a moment later. The client is told to wait `_RETRY_AFTER_S` before it retries,
unless the error has its own `retry_after_s`."""
_RETRY_AFTER_S = 1.0

_LONGEST_FIELD_NAME = 100
"""An error message repeats at most this many characters of a field name that the client sent."""


class ApiError(RequestError):
    """An error for the client: an HTTP error response or, once a stream has begun, an event in the stream."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID_REQUEST,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """`type`: OpenAI's error type. `code`, `param` and `retry_after_s`: see `RequestError`."""
        super().__init__(message, code=code, param=param, retry_after_s=retry_after_s)
        self.status = status
        self.type = type
        self.headers = dict(headers or {})

    @property
    def outcome(self) -> str:
        """For the log and the metrics."""
        return self.code or self.type

    def body(self) -> bytes:
        """OpenAI's error object as JSON."""
        return json.dumps(_openai_document(self, "")).encode()

    def response(self, shape: ErrorShape | None = None, request_id: str = "") -> Response:
        """The error as a whole HTTP response. `shape`: OpenAI's by default."""
        headers = self.headers
        if self.retry_after_s is not None:
            headers = headers | {"retry-after": str(max(1, math.ceil(self.retry_after_s)))}
            if self.status == 429:  # openai-python and anthropic-python prefer it, since a second is long here
                headers["retry-after-ms"] = str(math.ceil(self.retry_after_s * 1000))
        elif self.status >= 500:
            # openai-python retries every 5xx twice unless this header forbids it; after a missed deadline a retry can
            # take another 600 s.
            headers = headers | {"x-should-retry": "false"}
        document = (shape or OPENAI_ERRORS).document(self, request_id)
        return Response(json.dumps(document), self.status, headers, media_type="application/json")


@dataclass(frozen=True, slots=True)
class ErrorShape:
    """How the clients of one wire format read an error."""

    document: Callable[[ApiError, str], dict[str, object]]
    """JSON, from the error and the request's id."""
    id_header: str | None = None
    """The header in which these clients look for the request's id, besides `X-Request-Id`."""
    limit_headers: Callable[[Reservation], dict[str, str]] = openai_headers
    """The headers that tell these clients what is left of their limits."""


def _openai_document(error: ApiError, request_id: str) -> dict[str, object]:
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


OPENAI_ERRORS = ErrorShape(_openai_document)
"""OpenAI's error object. /stream has it too."""


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request itself is wrong."""
    return ApiError(400, message, param=param, code=code)


def unknown_parameter(name: str) -> ApiError:
    """400 for an unknown field."""
    param = _field_name((name,))
    return bad_request(f"Unknown parameter: '{param}'.", param=param, code="unknown_parameter")


def api_error(error: RequestError) -> ApiError:
    """The HTTP error for an error that any part of the service has raised."""
    if isinstance(error, ApiError):
        return error
    status, kind = _STATUSES.get(error.code or "", (400, INVALID_REQUEST))
    retry_after_s = error.retry_after_s
    if retry_after_s is None and error.code in _RETRIED:
        retry_after_s = _RETRY_AFTER_S
    if isinstance(error, LimitReached):
        kind = error.kind
    return ApiError(status, error.message, type=kind, param=error.param, code=error.code, retry_after_s=retry_after_s)


def body_too_large(max_bytes: int) -> ApiError:
    """413."""
    message = f"The request body is larger than this server's limit of {max_bytes} bytes."
    return ApiError(413, message, code="body_too_large", headers={"connection": "close"})


def internal_error(request_id: str) -> ApiError:
    """500. The log has the cause, under the request's id."""
    message = f"Internal error. The server's log has the details of request {request_id}."
    return ApiError(500, message, type=SERVER_ERROR, code="internal_error")


def from_validation(error: ValidationError) -> ApiError:
    """400 for a body that does not fit its schema: reports the first validation error, with the field's name."""
    details = error.errors(include_url=False, include_input=False)[0]
    kind, param = details["type"], _field_name(details["loc"])
    what = details["msg"] if details["msg"].endswith(".") else f"{details['msg']}."
    if kind == "missing":
        message, code = f"Missing required parameter: '{param}'.", "missing_required_parameter"
    elif kind.endswith(("_type", "_parsing")):
        message, code = f"Invalid type for '{param}': {what}", "invalid_type"
    else:
        message, code = f"Invalid value for '{param}': {what}", "invalid_value"
    return bad_request(message, param=param, code=code)


def _field_name(location: tuple[int | str, ...]) -> str:
    name = ""
    for part in location:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else part
    return name if len(name) <= _LONGEST_FIELD_NAME else name[:_LONGEST_FIELD_NAME] + "..."
