"""Reads JSON out of a longer text, as it comes, and writes pieces of it.

Promises linear cost. It follows brackets and strings, and leaves the rest of JSON's grammar to who reads the result:
a model's mistake is passed on as the model made it.
"""

from __future__ import annotations

import json
import re

from serve_app.chat.reading import Marks, Reader, Steps, Tell

_STRING = Marks('"', "\\")
_STRUCTURE = Marks('"', "{", "}", "[", "]")
_SCALAR = re.compile(r"[\w.+\-]*")


def read_value(reader: Reader, tell: Tell) -> Steps[bool]:
    """Read a value; `tell` gets its text. False: no value begins here, and nothing was read, or the text ended."""
    first = yield from reader.peek()
    if first == '"':
        return (yield from _read_string(reader, tell))
    if first and first in "{[":
        return (yield from _read_structure(reader, tell))
    scalar = yield from reader.run(_SCALAR)
    tell(scalar)
    return bool(scalar)


def read_string(reader: Reader) -> Steps[str | None]:
    """A string's value; None: none begins here, or it is broken."""
    raw: list[str] = []
    if (yield from reader.peek()) != '"' or not (yield from _read_string(reader, raw.append)):
        return None
    try:
        return str(json.loads("".join(raw), strict=False))
    except ValueError:
        return None


def escaped(text: str) -> str:
    """The text as it stands inside a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _read_string(reader: Reader, tell: Tell) -> Steps[bool]:
    tell((yield from reader.next()))
    return (yield from _rest_of_string(reader, tell))


def _read_structure(reader: Reader, tell: Tell) -> Steps[bool]:
    tell((yield from reader.next()))
    depth = 1
    while depth:
        mark = yield from reader.until(_STRUCTURE, tell)
        tell(mark)
        if not mark:
            return False
        if mark == '"':
            if not (yield from _rest_of_string(reader, tell)):
                return False
        else:
            depth += 1 if mark in "{[" else -1
    return True


def _rest_of_string(reader: Reader, tell: Tell) -> Steps[bool]:
    while mark := (yield from reader.until(_STRING, tell)):
        tell(mark)
        if mark == '"':
            return True
        tell((yield from reader.next()))
    return False
