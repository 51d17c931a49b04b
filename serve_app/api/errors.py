"""What an error looks like to a client: one table from codes to HTTP statuses, and OpenAI's error object.

    RequestError      what any room raises: `api_error` finds its status by its code
    └── ApiError      what is wrong with the HTTP request itself: it has its status

Promises that no traceback, path or prompt leaves the server. Knows no endpoint.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from pydantic import ValidationError
from starlette.responses import Response

from serve_app.core import FailureCode, RequestError

INVALID_REQUEST = "invalid_request_error"
SERVER_ERROR = "server_error"

_STATUSES: Mapping[str, tuple[int, str]] = {
    FailureCode.OVERLOADED: (503, SERVER_ERROR),
    FailureCode.NOT_READY: (503, SERVER_ERROR),
    FailureCode.WRONG_WEIGHTS: (503, SERVER_ERROR),
    FailureCode.DEADLINE_EXCEEDED: (504, SERVER_ERROR),
    FailureCode.REPLICA_LOST: (503, SERVER_ERROR),
    FailureCode.POISON: (500, SERVER_ERROR),
    FailureCode.ENGINE_FAILED: (500, SERVER_ERROR),
    "journal_unavailable": (503, SERVER_ERROR),
    "model_not_found": (404, INVALID_REQUEST),
    "slow_reader": (408, INVALID_REQUEST),
    "stream_changed": (410, INVALID_REQUEST),
    "stream_gone": (410, INVALID_REQUEST),
}
"""By code. Any other is 400: the request itself is wrong."""
_RETRIED = frozenset({FailureCode.OVERLOADED, FailureCode.WRONG_WEIGHTS, FailureCode.REPLICA_LOST})
"""Codes whose cause is mostly gone a moment later: a client is told to wait `_RETRY_AFTER_S`, if no time was named."""
_RETRY_AFTER_S = 1.0

_LONGEST_FIELD_NAME = 100
"""Characters of a client's own field name that an error repeats."""


class ApiError(RequestError):
    """An answer that is an error: an HTTP status before the response has begun, an event in the stream after."""

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
        """`type` is OpenAI's word for whose fault it is; the rest is as in `RequestError`."""
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
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()

    def response(self) -> Response:
        """The error as a whole HTTP response."""
        headers = self.headers
        if self.retry_after_s is not None:
            headers = headers | {"retry-after": str(max(1, math.ceil(self.retry_after_s)))}
        elif self.status >= 500:
            # openai-python repeats every 5xx twice unless told not to: another 600 s after a missed deadline.
            headers = headers | {"x-should-retry": "false"}
        return Response(self.body(), self.status, headers, media_type="application/json")


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request itself is wrong."""
    return ApiError(400, message, param=param, code=code)


def unknown_parameter(name: str) -> ApiError:
    """400 for a field that nobody knows."""
    param = _field_name((name,))
    return bad_request(f"Unknown parameter: '{param}'.", param=param, code="unknown_parameter")


def api_error(error: RequestError) -> ApiError:
    """What a client is told of an error that another room has raised."""
    if isinstance(error, ApiError):
        return error
    status, kind = _STATUSES.get(error.code or "", (400, INVALID_REQUEST))
    retry_after_s = error.retry_after_s
    if retry_after_s is None and error.code in _RETRIED:
        retry_after_s = _RETRY_AFTER_S
    return ApiError(status, error.message, type=kind, param=error.param, code=error.code, retry_after_s=retry_after_s)


def internal_error(request_id: str) -> ApiError:
    """500; what happened stands in the log under the request's id."""
    message = f"Internal error. The server's log has the details of request {request_id}."
    return ApiError(500, message, type=SERVER_ERROR, code="internal_error")


def from_validation(error: ValidationError) -> ApiError:
    """What a client is told of a body that does not fit its schema: its first error, with the field's name."""
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
