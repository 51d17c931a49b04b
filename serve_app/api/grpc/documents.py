"""The messages of proto/serve_app.proto and proto/jina.proto as the documents of POST /stream, and back.

Promises that what is not a field of a document is refused by name. Knows no call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from serve_app.api.errors import ApiError, bad_request
from serve_app.api.grpc import encoded
from serve_app.api.grpc.refusal import other_format
from serve_app.proto import jina_pb2, serve_app_pb2

JINA_ENDPOINTS = frozenset({"", "/", "/stream", "/default"})
"""Values of a Jina caller's `on` for which this service answers."""
MAX_JINA_ID_CHARS = 256
"""Of a Jina caller's `request_id`, which each answer repeats."""

_Message = TypeVar("_Message", bound=Message)


class TokenData(msgspec.Struct):
    """The data of a token's event."""

    token_id: int
    generated_text: str


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]


class _Done(msgspec.Struct):
    finish_reason: str
    usage: _Usage
    seed: int


token_data = msgspec.json.Decoder(TokenData).decode
"""Reads the data of a token's event; takes 0.5 us."""
_done_data = msgspec.json.Decoder(_Done).decode


def parse(kind: type[_Message], content: bytes, *, strict: bool = False) -> _Message:
    """`content` as a message. `strict`: fields that are not in its .proto are refused. Raises `ApiError`."""
    encoded.check(content, kind.DESCRIPTOR, strict=strict)
    try:
        message: _Message = kind.FromString(content)
    except DecodeError:  # such as a string that is not UTF-8
        raise encoded.malformed(kind.DESCRIPTOR) from None
    return message


def read_prompt(content: bytes) -> dict[str, Any]:
    """A `PromptDocument` as the JSON body of POST /stream. Raises `ApiError`."""
    message = parse(serve_app_pb2.PromptDocument, content, strict=True)
    document: dict[str, Any] = {}
    for field, value in message.ListFields():
        if field.name == "messages":
            document["messages"] = [_turn(turn) for turn in message.messages]
        else:
            document[field.name] = list(value) if field.name == "stop" else value
    return document


def read_jina_prompt(request: jina_pb2.SingleDocumentRequestProto) -> dict[str, Any]:
    """The document of a Jina caller as the JSON body of POST /stream, without its id. Raises `ApiError`."""
    if request.header.exec_endpoint not in JINA_ENDPOINTS:
        message = f"Nothing is served at {request.header.exec_endpoint[:100]}; send on='/stream'."
        raise ApiError(404, message, code="not_found")
    nodes = request.document.data
    fields = {name: _value(name, node) for name, node in nodes.items() if name != "id"}
    return {name: value for name, value in fields.items() if value is not None}


def jina_header(header: jina_pb2.HeaderProto) -> jina_pb2.HeaderProto:
    """What each answer's header repeats of a Jina caller's. Raises `ApiError`."""
    if len(header.request_id) > MAX_JINA_ID_CHARS:
        message = f"At most {MAX_JINA_ID_CHARS} characters of a request_id are taken."
        raise bad_request(message, param="request_id", code="invalid_value")
    return jina_pb2.HeaderProto(request_id=header.request_id, exec_endpoint=header.exec_endpoint)


def answer(name: str, data: bytes, event_id: str) -> serve_app_pb2.ModelOutputDocument:
    """The message for an event of POST /stream. Raises `Refusal` for one of a stream in another format."""
    try:
        if name == "message":
            token = token_data(data)
            return serve_app_pb2.ModelOutputDocument(
                token_id=token.token_id, generated_text=token.generated_text, event_id=event_id
            )
        if name == "done":
            return serve_app_pb2.ModelOutputDocument(done=_done(_done_data(data)), event_id=event_id)
    except msgspec.MsgspecError:
        pass
    raise other_format()


def jina_answer(
    header: jina_pb2.HeaderProto, document_id: str, token: TokenData
) -> jina_pb2.SingleDocumentRequestProto:
    """One token for a Jina caller, as a DocArray document with the fields `id`, `token_id` and `generated_text`."""
    data = {
        "id": jina_pb2.NodeProto(text=document_id, type="id"),
        "token_id": jina_pb2.NodeProto(integer=token.token_id),
        "generated_text": jina_pb2.NodeProto(text=token.generated_text),
    }
    return jina_pb2.SingleDocumentRequestProto(header=header, document=jina_pb2.DocProto(data=data))


def _done(read: _Done) -> serve_app_pb2.Done:
    usage = serve_app_pb2.Usage(
        prompt_tokens=read.usage.prompt_tokens,
        completion_tokens=read.usage.completion_tokens,
        total_tokens=read.usage.total_tokens,
        cached_prompt_tokens=read.usage.prompt_tokens_details.get("cached_tokens", 0),
    )
    return serve_app_pb2.Done(finish_reason=read.finish_reason, usage=usage, seed=read.seed)


def _turn(turn: serve_app_pb2.Message) -> Mapping[str, str]:
    fields = {"role": turn.role, "content": turn.content}
    return {**fields, "name": turn.name} if turn.HasField("name") else fields


def _value(name: str, node: jina_pb2.NodeProto) -> Any:
    """A field of a DocArray document; None for one that is None there."""
    kind = node.WhichOneof("content")
    if kind == "list":
        return [_value(name, item) for item in node.list.data]
    if kind is not None:
        return getattr(node, kind)
    if len(UnknownFieldSet(node)):
        message = f"The field '{name[:100]}' has a type that is not taken; send texts, numbers, booleans or lists."
        raise bad_request(message, param=name[:100], code="invalid_type")
    return None
