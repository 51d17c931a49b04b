"""Calls written as Python: `[f(a=1, b="x"), g()]` (Llama 3.2 and 4), or in a block of code (Gemma 3).

The arguments become JSON as they come. Only a function that names a tool of the request is a call.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection

from serve_app.chat.answer_parser import Answer, ToolFormat
from serve_app.chat.reading import Marks, Reader, Steps, Tell
from serve_app.chat.tool_formats.json_calls import read_bare, read_marked
from serve_app.chat.tool_formats.json_text import MAX_DEPTH, escaped

_IDENTIFIER = re.compile(r"[\w.\-]*")
_WORD = re.compile(r"[\w.+\-]*")
_HEX = re.compile(r"[0-9a-fA-F]*")
_WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "0": "\0", "\n": ""}
_CODE_DIGITS = {"x": 2, "u": 4, "U": 8}
_REST = Marks()


class Pythonic(ToolFormat):
    """A list of calls: the whole answer, or between Llama 4's `<|python_start|>` and `<|python_end|>`."""

    name = "pythonic"
    begins = ("<|python_start|>", "<|python_tag|>")
    bare = "[{"
    tokens = ("<|python_end|>",)
    end_tokens = ("<|eom_id|>", "<|eom|>")

    def __init__(self, offered: Collection[str]) -> None:
        self._offered = offered

    def read(self, reader: Reader, answer: Answer, mark: str) -> Steps[None]:
        """See `ToolFormat`."""
        yield from reader.space()
        if (yield from reader.peek()) == "{":
            yield from read_bare(reader, answer, self._offered)
            return
        if not (yield from reader.has("[")):
            return
        while (yield from read_call(reader, answer, self._offered)) and not answer.ended:
            reader.hold()
            yield from reader.space()
            if (yield from reader.has("]")):
                yield from reader.has("<|python_end|>")
                reader.release()
                return
            if not (yield from reader.has(",")):
                return


class ToolCode(ToolFormat):
    """Lines of calls in a block of code, as Gemma 3 is asked for them; `print(...)` around a call is left out."""

    name = "tool_code"
    begins = ("```tool_code",)

    def __init__(self, offered: Collection[str]) -> None:
        self._offered = offered

    def read(self, reader: Reader, answer: Answer, mark: str) -> Steps[None]:
        """See `ToolFormat`."""
        yield from reader.space()
        if (yield from reader.peek()) == "{":
            yield from read_marked(reader, answer, "```")
            return
        while True:
            bracket = yield from reader.one_of("print(", "[")
            if not (yield from read_call(reader, answer, self._offered)) or answer.ended:
                return
            reader.hold()
            yield from reader.space()
            yield from reader.one_of({"print(": ")", "[": "]"}.get(bracket, ","))
            yield from reader.space()
            if (yield from reader.has("```")):
                reader.release()
                return


def read_call(reader: Reader, answer: Answer, offered: Collection[str]) -> Steps[bool]:
    """Read `name(key=value, ...)`; False if it is no call, or broken: the rest is then told as its arguments."""
    yield from reader.space()
    name = yield from reader.run(_IDENTIFIER)
    name = name.removeprefix("default_api.").removeprefix("functions.")
    if name not in offered or not (yield from reader.has("(")):
        return False
    answer.call(name)
    yield from reader.space()
    whole = (yield from reader.has(")")) or (yield from _arguments(reader, answer.arguments))
    if not whole:
        yield from reader.until(_REST, answer.arguments)
        return False
    answer.end_call()
    return True


def _arguments(reader: Reader, tell: Tell) -> Steps[bool]:
    start = "{"
    while True:
        key = yield from reader.run(_IDENTIFIER)
        yield from reader.space()
        if not key or not (yield from reader.has("=")):
            tell(key)
            return False
        tell(f"{start}{json.dumps(key, ensure_ascii=False)}: ")
        yield from reader.space()
        if not (yield from read_value(reader, tell)):
            return False
        yield from reader.space()
        comma = yield from reader.has(",")
        yield from reader.space()
        if (yield from reader.has(")")):
            tell("}")
            return True
        if not comma:
            return False
        start = ", "


def read_value(reader: Reader, tell: Tell, depth: int = MAX_DEPTH) -> Steps[bool]:
    """Read a Python literal; `tell` gets JSON. False if it is none, or nested more deeply than `depth`."""
    first = yield from reader.peek()
    if first and first in "'\"":
        return (yield from _string(reader, tell))
    if first and first in "[({":
        return depth > 0 and (yield from _container(reader, tell, depth - 1))
    word = yield from reader.run(_WORD)
    value = _WORDS.get(word) or _number(word)
    tell(value or word)
    return value is not None


def _number(word: str) -> str | None:
    """A number's JSON; None if it is none, or none that JSON has."""
    for kind in (lambda text: int(text, 0), float):
        try:
            return json.dumps(kind(word), allow_nan=False)
        except ValueError:
            continue
    return None


def _container(reader: Reader, tell: Tell, depth: int) -> Steps[bool]:
    opening = yield from reader.next()
    is_dict = opening == "{"
    closing = {"[": "]", "(": ")", "{": "}"}[opening]
    tell("{" if is_dict else "[")
    first = True
    while True:
        yield from reader.space()
        if (yield from reader.has(closing)):
            tell("}" if is_dict else "]")
            return True
        if not first:
            if not (yield from reader.has(",")):
                return False
            yield from reader.space()
            if (yield from reader.has(closing)):
                tell("}" if is_dict else "]")
                return True
            tell(", ")
        if is_dict and not (yield from _key(reader, tell)):
            return False
        if not (yield from read_value(reader, tell, depth)):
            return False
        first = False


def _key(reader: Reader, tell: Tell) -> Steps[bool]:
    if (yield from reader.peek()) in tuple("[({"):  # no key of JSON; its text, quoted at each level, grows as 2^depth
        return False
    pieces: list[str] = []
    whole = yield from read_value(reader, pieces.append)
    key = "".join(pieces)
    tell(key if key.startswith('"') else json.dumps(key))
    yield from reader.space()
    if not whole or not (yield from reader.has(":")):
        return False
    tell(": ")
    yield from reader.space()
    return True


def _string(reader: Reader, tell: Tell) -> Steps[bool]:
    quote = yield from reader.one_of('"""', "'''", '"', "'")
    marks = Marks(quote, "\\")
    tell('"')
    while mark := (yield from reader.until(marks, lambda text: tell(escaped(text)))):
        if mark == quote:
            tell('"')
            return True
        yield from _escape(reader, tell)
    return False


def _escape(reader: Reader, tell: Tell) -> Steps[None]:
    kind = yield from reader.next()
    if kind in _CODE_DIGITS:
        digits = ""
        while len(digits) < _CODE_DIGITS[kind] and _HEX.fullmatch((yield from reader.peek()) or "-"):
            digits += yield from reader.next()
        code = int(digits, 16) if len(digits) == _CODE_DIGITS[kind] else 0x110000
        if code > 0x10FFFF:
            tell(escaped(f"\\{kind}{digits}"))
        else:  # half of a surrogate pair stays an escape: JSON joins the two
            tell(f"\\u{code:04x}" if 0xD800 <= code < 0xE000 else escaped(chr(code)))
    elif kind in _ESCAPES:
        tell(escaped(_ESCAPES[kind]))
    else:
        tell(escaped(kind if kind in "\\'\"" else f"\\{kind}"))
