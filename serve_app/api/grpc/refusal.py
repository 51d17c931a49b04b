"""What an error looks like to a gRPC client: a status code, and the API's error object as JSON in the details.

Promises one code for each HTTP status, so that an error means the same over both.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import grpc

from serve_app.api.errors import ApiError, api_error, bad_request, internal_error
from serve_app.core import RequestError

_CODES: Mapping[int, grpc.StatusCode] = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.ABORTED,
    410: grpc.StatusCode.FAILED_PRECONDITION,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""By HTTP status. 413: gRPC itself gives a message that is too large this code."""


class Refusal(Exception):
    """The call has to end with this status; whoever serves the call hands `code` and `details` to gRPC."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(code, details)
        self.code = code
        self.details = details

    def __str__(self) -> str:
        return self.details


def refusal(error: RequestError, request_id: str = "") -> Refusal:
    """The status of an error that any part of the service has raised."""
    known = api_error(error)
    document: dict[str, Any] = {**json.loads(known.body()), "status": known.status}
    if request_id:
        document["request_id"] = request_id
    if known.retry_after_s is not None:
        document["retry_after_s"] = max(1, math.ceil(known.retry_after_s))
    # What HTTP has in its headers is in the details, since Serve passes no metadata on with an error.
    otherwise = grpc.StatusCode.INTERNAL if known.status >= 500 else grpc.StatusCode.INVALID_ARGUMENT
    return Refusal(_CODES.get(known.status, otherwise), json.dumps(document))


def of_answer(status: int, body: bytes, headers: Mapping[str, str]) -> Refusal:
    """The status for an HTTP error."""
    request_id, retry_after = headers.get("x-request-id", ""), headers.get("retry-after", "")
    try:
        error = json.loads(body)["error"]
    except (ValueError, TypeError, KeyError):  # the application has failed without an answer
        return refusal(internal_error(request_id), request_id)
    retry_after_s = float(retry_after) if retry_after.isdecimal() else None
    made = ApiError(
        status,
        error["message"],
        type=error["type"],
        param=error["param"],
        code=error["code"],
        retry_after_s=retry_after_s,
    )
    return refusal(made, request_id)


def of_event(data: bytes, request_id: str) -> Refusal:
    """The status for the `error` event of a stream, which has no HTTP status."""
    try:
        error = json.loads(data)["error"]
        known = api_error(RequestError(error["message"], code=error["code"], param=error["param"]))
    except KeyError:
        return other_format(request_id)
    if known.type != error["type"]:  # a mistake of the server, whose code is in no table
        known = internal_error(request_id)
    return refusal(known, request_id)


def other_format(request_id: str = "") -> Refusal:
    """The status where a caller resumes a stream whose events have no gRPC message."""
    message = "This stream began in a format that gRPC does not have; continue it with GET /v1/streams/{stream id}."
    return refusal(bad_request(message, code="invalid_event_id"), request_id)
