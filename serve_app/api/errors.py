"""What an error looks like to a client: one table from causes to HTTP statuses and OpenAI's error object.

Promises that no traceback, path or prompt leaves the server. Knows no endpoint.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.responses import Response

from serve_app.chat.errors import PromptError
from serve_app.core import Failure, FailureCode, LoadStage

INVALID_REQUEST = "invalid_request_error"
SERVER_ERROR = "server_error"

_FAILURES: Mapping[FailureCode, tuple[int, str]] = {
    FailureCode.CONTEXT_LENGTH_EXCEEDED: (400, INVALID_REQUEST),
    FailureCode.INVALID_REQUEST: (400, INVALID_REQUEST),
    FailureCode.OVERLOADED: (503, SERVER_ERROR),
    FailureCode.NOT_READY: (503, SERVER_ERROR),
    FailureCode.WRONG_WEIGHTS: (503, SERVER_ERROR),
    FailureCode.DEADLINE_EXCEEDED: (504, SERVER_ERROR),
    FailureCode.REPLICA_LOST: (503, SERVER_ERROR),
    FailureCode.POISON: (500, SERVER_ERROR),
    FailureCode.ENGINE_FAILED: (500, SERVER_ERROR),
}
_RETRY_AFTER_S = 1.0
"""Said with a 503 whose cause named no time of its own."""
_LOADING_RETRY_AFTER_S = 5.0

_LONGEST_FIELD_NAME = 100
"""Characters of a client's own field name that an error repeats."""


class ApiError(Exception):
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
        """`message`: what is wrong and what to do. `param`: the field, as `messages[0].role`. `code`: for programs."""
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s
        self.headers = dict(headers or {})

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


def from_failure(failure: Failure) -> ApiError:
    """What a client is told of a generation that failed."""
    status, kind = _FAILURES[failure.code]
    retry_after_s = failure.retry_after_s
    if status == 503 and retry_after_s is None:
        retry_after_s = _RETRY_AFTER_S
    return ApiError(status, failure.message, type=kind, code=str(failure.code), retry_after_s=retry_after_s)


def from_prompt(error: PromptError) -> ApiError:
    """What a client is told of messages or a prompt that can't be served."""
    return bad_request(error.message, param=error.param, code=error.code or "invalid_prompt")


def not_ready(stage: LoadStage) -> ApiError:
    """503: there is no model to answer with, yet or for good."""
    if stage.error is not None:
        return ApiError(503, f"The model could not be loaded: {stage.error}", type=SERVER_ERROR, code="not_ready")
    message = f"The model is not ready yet ({stage.stage}); GET /ready says how far it is."
    return from_failure(Failure(FailureCode.NOT_READY, message, _LOADING_RETRY_AFTER_S))


def not_found(path: str) -> ApiError:
    """404 for a path that is not served."""
    return ApiError(404, f"Nothing is served at {path[:_LONGEST_FIELD_NAME]}.", code="not_found")


def model_not_found(name: str) -> ApiError:
    """404 as OpenAI gives it for a model that is not served here."""
    message = f"The model '{name[:_LONGEST_FIELD_NAME]}' does not exist; GET /v1/models lists what is served."
    return ApiError(404, message, param="model", code="model_not_found")


def internal_error(request_id: str) -> ApiError:
    """500; what happened stands in the log under the request's id."""
    message = f"The server made a mistake. Its log has the details of request {request_id}."
    return ApiError(500, message, type=SERVER_ERROR, code="internal_error")


def from_validation(error: ValidationError) -> ApiError:
    """What a client is told of a body that does not fit its schema: its first error, with the field's name."""
    details = error.errors(include_url=False, include_input=False)[0]
    param = _field_name(details["loc"])
    match details["type"]:
        case "missing":
            return bad_request(
                f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter"
            )
        case "unsupported_parameter":
            message = f"The parameter '{param}' can't be used: {_sentence(details)}"
            return bad_request(message, param=param, code="unsupported_parameter")
        case kind if kind.endswith(("_type", "_parsing")):
            message = f"Invalid type for '{param}': {_sentence(details)}"
            return bad_request(message, param=param, code="invalid_type")
        case _:
            message = f"Invalid value for '{param}': {_sentence(details)}" if param else _sentence(details)
            return bad_request(message, param=param or None, code="invalid_value")


def _field_name(location: tuple[int | str, ...]) -> str:
    name = ""
    for part in location:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else part
    return name if len(name) <= _LONGEST_FIELD_NAME else name[:_LONGEST_FIELD_NAME] + "..."


def _sentence(details: ErrorDetails) -> str:
    context: dict[str, Any] = details.get("ctx", {})
    message = str(context["error"]) if "error" in context else details["msg"]
    return message if message.endswith(".") else f"{message}."
