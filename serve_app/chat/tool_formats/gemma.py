"""Gemma's calls: `<start_function_call>call:f{a:<escape>text<escape>,b:1}<end_function_call>` (FunctionGemma), and
`<|tool_call>call:f{a:<|"|>text<|"|>,b:1}<tool_call|>` (Gemma 4).

The arguments become JSON as they come.
"""

from __future__ import annotations

import json
import re

from serve_app.chat.answer_parser import Answer, ToolFormat
from serve_app.chat.reading import Marks, Reader, Steps, Tell
from serve_app.chat.tool_formats.json_calls import read_marked
from serve_app.chat.tool_formats.json_text import MAX_DEPTH, escaped, is_json, read_string

_NAME = re.compile(r"[\w.\-]*")
_KEY = re.compile(r"[^:{}\[\],<\s]*")
_SCALAR = re.compile(r"[^,{}\[\]<]*")


class Gemma(ToolFormat):
    """The two differ in their marks."""

    def __init__(self, name: str, begin: str, end: str, quote: str) -> None:
        self.name = name
        self.begins = (begin,)
        self.tokens = (end, quote)
        self._end = end
        self._quote = quote

    def read(self, reader: Reader, answer: Answer, mark: str) -> Steps[None]:
        """See `ToolFormat`."""
        yield from reader.space()
        if (yield from reader.peek()) == "{":
            yield from read_marked(reader, answer, self._end)
            return
        if not (yield from reader.has("call:")):
            return
        name = yield from reader.run(_NAME)
        if not name or (yield from reader.peek()) != "{":
            return
        answer.call(name)
        if (yield from self._value(reader, answer.arguments)):
            yield from reader.space()
            yield from reader.has(self._end)
            answer.end_call()
        elif (yield from reader.until(Marks(self._end), answer.arguments)):
            answer.end_call()

    def _value(self, reader: Reader, tell: Tell, depth: int = MAX_DEPTH) -> Steps[bool]:
        if (yield from reader.has(self._quote)):
            tell('"')
            mark = yield from reader.until(Marks(self._quote), lambda text: tell(escaped(text)))
            tell('"' if mark else "")
            return bool(mark)
        first = yield from reader.peek()
        if first and first in "{[":
            return depth > 0 and (yield from self._container(reader, tell, depth - 1))
        if first == '"':
            text = yield from read_string(reader)
            tell(json.dumps(text, ensure_ascii=False) if text is not None else "")
            return text is not None
        scalar = (yield from reader.run(_SCALAR)).strip()
        tell(scalar if is_json(scalar) else json.dumps(scalar, ensure_ascii=False))
        return bool(scalar)

    def _container(self, reader: Reader, tell: Tell, depth: int) -> Steps[bool]:
        opening = yield from reader.next()
        closing = "}" if opening == "{" else "]"
        tell(opening)
        yield from reader.space()
        if (yield from reader.has(closing)):
            tell(closing)
            return True
        while True:
            if opening == "{" and not (yield from self._key(reader, tell)):
                return False
            if not (yield from self._value(reader, tell, depth)):
                return False
            yield from reader.space()
            if (yield from reader.has(closing)):
                tell(closing)
                return True
            if not (yield from reader.has(",")):
                return False
            tell(", ")
            yield from reader.space()

    def _key(self, reader: Reader, tell: Tell) -> Steps[bool]:
        if (yield from reader.has(self._quote)):
            pieces: list[str] = []
            yield from reader.until(Marks(self._quote), pieces.append)
            key = "".join(pieces)
        else:
            quoted = yield from read_string(reader)
            key = (yield from reader.run(_KEY)) if quoted is None else quoted
        tell(f"{json.dumps(key, ensure_ascii=False)}: ")
        yield from reader.space()
        if not (yield from reader.has(":")):
            return False
        yield from reader.space()
        return True


FUNCTION_GEMMA = Gemma("function_gemma", "<start_function_call>", "<end_function_call>", "<escape>")
GEMMA_4 = Gemma("gemma4", "<|tool_call>", "<tool_call|>", '<|"|>')
