"""Which error shape a request's client reads.

Promises a shape for every request, before it is read. Knows no handler.
"""

from __future__ import annotations

from starlette.datastructures import Headers

from serve_app.api.anthropic.errors import ANTHROPIC_ERRORS
from serve_app.api.errors import OPENAI_ERRORS, ErrorShape

ANTHROPIC_VERSION = "anthropic-version"
"""The header that every client of Anthropic's API sends, and no other does."""
_MESSAGES = "/v1/messages"


def error_shape(path: str, headers: Headers) -> ErrorShape:
    """`path`: below the application's own prefix."""
    if path == _MESSAGES or path.startswith(f"{_MESSAGES}/") or ANTHROPIC_VERSION in headers:
        return ANTHROPIC_ERRORS
    return OPENAI_ERRORS
