"""Errors in the shape of Anthropic's API.

Source: docs.claude.com/en/api/errors, and the types of the package anthropic. Knows no endpoint.
"""

from __future__ import annotations

from collections.abc import Mapping

from serve_app.api.errors import ApiError, ErrorShape
from serve_app.api.limit_headers import anthropic_headers
from serve_app.core import FailureCode

_TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""Anthropic's error type by HTTP status. Any other 4xx is `invalid_request_error`, any other 5xx `api_error`."""


def error_document(error: ApiError, request_id: str) -> dict[str, object]:
    """Anthropic's error object.

    Its clients have no field for `param` and `code`: the message names the field, as all messages of this service do.
    `details.error_code` is where they look for a code.
    """
    kind = _TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    content: dict[str, object] = {"type": kind, "message": _named(error)}
    if error.code is not None:
        content["details"] = {"error_code": error.code}
    return {"type": "error", "error": content, "request_id": request_id}


_TOO_LONG = "prompt is too long"
"""Anthropic's own words, by which its clients (Claude Code, litellm) know that the conversation has to be shortened."""


def _named(error: ApiError) -> str:
    """The message, with the field at its beginning if it does not name it."""
    if error.code == FailureCode.CONTEXT_LENGTH_EXCEEDED:
        return f"{_TOO_LONG}: {error.message}"
    if error.param is None or error.param in error.message:
        return error.message
    return f"{error.param}: {error.message}"


ANTHROPIC_ERRORS = ErrorShape(error_document, id_header="request-id", limit_headers=anthropic_headers)
