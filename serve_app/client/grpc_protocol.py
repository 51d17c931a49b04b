"""What the sync and the async client share over gRPC: messages, metadata and errors, without doing any I/O.

Promises the errors that the same answer has over HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeGuard
from urllib.parse import urlsplit

import grpc
from google.protobuf.message import DecodeError

from serve_app.client import protocol
from serve_app.client.documents import Done, ModelOutputDocument, Usage
from serve_app.client.errors import BadRequest, ConnectionLost, Overloaded, ServeAppError, ServerError, StreamError
from serve_app.client.resume import Position
from serve_app.proto import serve_app_pb2

STREAM = "/serve_app.v1.ServeApp/Stream"
CHECK = "/grpc.health.v1.Health/Check"
CHECK_TIMEOUT_S = 10.0
SERVING = b"\x08\x01"
"""A `HealthCheckResponse` with the status SERVING."""
_KEEPALIVE = [("grpc.keepalive_time_ms", 15_000), ("grpc.keepalive_timeout_ms", 10_000)]
"""Of channels for streams that can be resumed: a dead connection is noticed within 25 s. Other streams may be silent
for long, and a server takes many pings in a silence for an attack."""
_STATUSES: Mapping[grpc.StatusCode, int] = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.FAILED_PRECONDITION: 410,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.UNIMPLEMENTED: 501,
}
"""The HTTP status that says the same. Other codes, without an error of the server in their details, come from lost
connections."""


def target_of(base_url: str) -> tuple[str, bool]:
    """`grpc://host:port` -> (`host:port`, whether with TLS). Raises ValueError."""
    parts = urlsplit(base_url)
    try:
        port = parts.port
    except ValueError:
        port = None
    if not parts.hostname or port is None or parts.path not in ("", "/") or parts.query:
        raise ValueError(f"{base_url!r} is not an address; write e.g. grpc://127.0.0.1:9000")
    return parts.netloc.rpartition("@")[2], parts.scheme == "grpcs"


def channel_options(target: str, *, resume: bool) -> list[tuple[str, int]]:
    """The options of a channel; `resume`: for streams that can be resumed."""
    options = _KEEPALIVE if resume else []
    if protocol.is_loopback(target.rpartition(":")[0].strip("[]")):
        options = [
            *options,
            ("grpc.enable_http_proxy", 0),
        ]  # a proxy for the outside can't reach this machine's loopback
    return options


def metadata_of(headers: Mapping[str, str]) -> list[tuple[str, str]]:
    """HTTP headers as the metadata of a call."""
    return [(name.lower(), value) for name, value in headers.items()]


def request_of(body: Mapping[str, Any]) -> bytes:
    """The body of POST /stream as a message. Raises BadRequest for what the message has no place for."""
    fields = dict(body)
    if isinstance(fields.get("stop"), str):
        fields["stop"] = [fields["stop"]]
    if isinstance(seed := fields.get("seed"), int) and seed < 0:
        if seed == -1:  # the server's word for none
            del fields["seed"]
        else:
            fields["seed"] = seed % 2**64
    try:
        content: bytes = serve_app_pb2.PromptDocument(**fields).SerializeToString()
    except (TypeError, ValueError) as reason:
        raise BadRequest(f"The request can't be sent over gRPC: {reason}", status=400) from reason
    return content


def read_message(content: bytes, position: Position) -> ModelOutputDocument | Done | None:
    """What a message of the stream means; None for one that only shows where the stream is."""
    try:
        message = serve_app_pb2.ModelOutputDocument.FromString(content)
    except DecodeError as reason:
        raise ServerError("a message of the stream can't be read; is this a serve_app?") from reason
    if message.event_id:
        position.began({"x-stream-id": message.event_id.partition(":")[0]})
    is_new = position.take(message.event_id)
    if message.HasField("done") and is_new:
        usage = Usage(message.done.usage.prompt_tokens, message.done.usage.completion_tokens)
        return Done(message.done.finish_reason, usage, message.done.seed)
    if message.HasField("token_id") and is_new:
        return ModelOutputDocument(message.token_id, message.generated_text)
    return None


def may_be_repeated(error: ServeAppError) -> TypeGuard[Overloaded | ConnectionLost]:
    """Whether a call that has delivered nothing may be made again. Not after a timeout: the server may be at work."""
    reason = error.__cause__
    timed_out = isinstance(reason, grpc.RpcError) and reason.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    return isinstance(error, Overloaded | ConnectionLost) and not timed_out


def error_of(error: grpc.RpcError, target: str, *, begun: bool) -> ServeAppError:
    """The typed error for a call that has failed. `begun`: messages had come before."""
    code, details = error.code(), error.details() or ""
    try:
        document = json.loads(details)
    except ValueError:
        document = None
    if isinstance(document, dict) and isinstance(document.get("error"), dict):
        named = {"x-request-id": document.get("request_id"), "retry-after": document.get("retry_after_s")}
        headers = {name: str(value) for name, value in named.items() if value is not None}
        known = protocol.error_of(int(document.get("status", 500)), headers, details.encode())
        if begun:
            return StreamError(known.message, code=known.code, request_id=known.request_id)
        return known
    if (status := _STATUSES.get(code)) is not None:
        return protocol.error_of(status, {}, json.dumps({"error": {"message": details}}).encode())
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return ConnectionLost(f"the server at {target} has not answered in time")
    if code == grpc.StatusCode.UNAVAILABLE and not begun:
        return ConnectionLost(f"no server answers at {target} ({details})")
    return ConnectionLost(f"the connection to {target} was lost ({details or code.name})")
