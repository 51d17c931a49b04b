"""Reads JSON out of a longer text, as it comes, and writes pieces of it.

Promises linear cost, and that no text that a model can write raises anything but what a function names. Reading follows
brackets and strings only: a mistake of the model is passed on as the model made it.
"""

from __future__ import annotations

import json
import re
from typing import Any

from serve_app.chat.reading import Marks, Reader, Steps, Tell

_STRING = Marks('"', "\\")
_STRUCTURE = Marks('"', "{", "}", "[", "]")
_SCALAR = re.compile(r"[\w.+\-]*")
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")

MAX_DEPTH = 64
"""Lists and objects inside one another that a reader follows which calls itself at each level."""


def value_of(text: str) -> Any:
    """The value of a JSON text, in which control characters may stand in strings. Raises ValueError.

    Its strings may hold halves of characters (`\\ud800`), which no encoding can hold: see `written`.
    """
    try:
        return json.loads(text, strict=False, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def is_json(text: str) -> bool:
    """Whether a text is JSON."""
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def written(value: Any) -> str:
    """A value as JSON that can be encoded. Raises ValueError: it is not finite, or nested too deeply."""
    try:
        return encodable(json.dumps(value, ensure_ascii=False, allow_nan=False))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def encodable(json_text: str) -> str:
    """A JSON text with halves of characters written as escapes, which mean the same in its strings."""
    return _HALF_CHARACTER.sub(lambda half: f"\\u{ord(half[0]):04x}", json_text)


def _refuse(constant: str) -> None:
    """NaN and Infinity are no JSON."""
    raise ValueError(f"{constant} is not JSON")


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
    """A string's value; None: none begins here, or it is broken, or has half a character."""
    raw: list[str] = []
    if (yield from reader.peek()) != '"' or not (yield from _read_string(reader, raw.append)):
        return None
    try:
        value = str(value_of("".join(raw)))
    except ValueError:
        return None
    return None if _HALF_CHARACTER.search(value) else value


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
