"""What a request may use, between its wire format and its caller's limits.

Promises that each request is counted once, before it starts. Knows no store and no header.
"""

from __future__ import annotations

from serve_app.access.lengths import fitted, reserved_tokens
from serve_app.api.http.endpoint import Call
from serve_app.generation.request import ResolvedRequest
from serve_app.resume.stream import ResumableStream


def fit(call: Call, request: ResolvedRequest, param: str) -> ResolvedRequest:
    """The request with its answers cut to what its caller may ask for; the answer tells of the cut.

    `param`: the field with the caller's own limit. Raises `RequestError`.
    """
    cut = fitted(request, call.caller, param)
    if cut is not request:
        call.record.clamped_fields[param] = min(each.max_new_tokens for each in cut.requests)
    return cut


async def reserve(call: Call, request: ResolvedRequest) -> None:
    """Count the request, with all that it may use. Raises `LimitReached`."""
    if call.reservation is not None:
        await call.reservation.take(reserved_tokens(request), stream=True)


def outlive(call: Call, stream: ResumableStream) -> None:
    """Let `stream`, which goes on when its request is answered, keep what the request has reserved."""
    if (reservation := call.reservation) is not None:
        reservation.outlived_by(stream, lambda: stream.used_tokens(reservation.tokens))
