"""How a resumable stream is stored: a document that says how to generate it, then records of its output so far.

A record is the replies of one tick (`core.encode_replies`), each with the number of its choice; a failure has choice 0,
since it ends the whole stream. Promises that what is read is what was written, to the last bit of a float. Knows no
store. Uses no pickle, since a record may come from anybody who can write to the store.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from serve_app.core import MessageError
from serve_app.generation.request import ResolvedRequest


class StreamDocument(Struct, frozen=True):
    """All that an ingress needs to continue a stream that another one began."""

    request: ResolvedRequest
    """The request as it was at first, without output. `remaining_s` counts from the journal's creation."""
    caller: str
    """Who may resume it: a digest of what the caller authenticated with."""
    wire_format: str
    """The name of the wire format in which the stream's events are written."""
    settings: dict[str, Any] = {}
    """What the wire format's writer needs besides the request: JSON."""
    background: bool = False
    """It is generated to its end whether somebody reads it or not."""


_DOCUMENT = msgspec.msgpack.Decoder(StreamDocument)


def write_document(document: StreamDocument) -> bytes:
    """The document as a journal keeps it."""
    return msgspec.msgpack.encode(document)


def read_document(content: bytes) -> StreamDocument:
    """The document that a journal has kept. Raises `MessageError`."""
    try:
        return _DOCUMENT.decode(content)
    except (msgspec.MsgspecError, ValueError) as error:
        raise MessageError("this is no document of a stream") from error
