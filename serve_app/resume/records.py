"""How a resumable stream is written down: a document that says how to make it, then what it has said so far.

A record is the replies of one tick (`core.encode_replies`), numbered by choice; a failure has choice 0, since it ends
the whole stream. Promises that what is read is what was written, to the last bit of a float. Knows no store; no pickle,
since whoever can write to the store may have written it.
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
    """As first made: without output. `remaining_s` counts from the journal's creation."""
    caller: str
    """Who may resume it: a digest of what the caller authenticated with."""
    wire_format: str
    """The name of the one in which its events are written."""
    settings: dict[str, Any] = {}
    """What that format's writer needs besides the request: JSON."""


_DOCUMENT = msgspec.msgpack.Decoder(StreamDocument)


def write_document(document: StreamDocument) -> bytes:
    """As it is kept in a journal."""
    return msgspec.msgpack.encode(document)


def read_document(content: bytes) -> StreamDocument:
    """Raises `MessageError`."""
    try:
        return _DOCUMENT.decode(content)
    except (msgspec.MsgspecError, ValueError) as error:
        raise MessageError("this is no document of a stream") from error
