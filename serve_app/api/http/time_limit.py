"""How long a request may take: what the service allows, or less if its client says so. Knows no clock."""

from __future__ import annotations

from starlette.datastructures import Headers

from serve_app.api.errors import bad_request
from serve_app.api.headers import TIMEOUT_HEADER


def time_limit_s(headers: Headers, longest_s: float) -> float:
    """Seconds from the request's arrival to its end, waiting included. Raises `ApiError` for a header that is wrong."""
    given = headers.get(TIMEOUT_HEADER)
    if given is None:
        return longest_s
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:  # NaN is not either
        message = "X-Request-Timeout must be a number of seconds above 0, such as 30 or 0.5."
        raise bad_request(message, param=TIMEOUT_HEADER, code="invalid_value")
    return min(seconds, longest_s)
