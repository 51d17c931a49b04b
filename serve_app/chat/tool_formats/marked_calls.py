"""Formats that put special tokens around the name and the arguments of a call: DeepSeek V3, Kimi K2.

The arguments are passed on in the model's own characters.
"""

from __future__ import annotations

import re
from abc import abstractmethod

from serve_app.chat.answer_parser import Answer, ToolFormat
from serve_app.chat.reading import Marks, Reader, Steps
from serve_app.chat.tool_formats.json_text import read_value

_WORD = re.compile(r"[^<\s]*")
_LINE = re.compile(r"[^<\n]*")


class MarkedCalls(ToolFormat):
    """Calls in a section with a mark at its beginning and its end, each between marks of its own."""

    call_begin = ""
    call_end = ""
    section_end = ""

    def read(self, reader: Reader, answer: Answer, mark: str) -> Steps[None]:
        """See `ToolFormat`. The section's beginning may be missing, and so may its end."""
        yield from reader.space()
        if mark != self.call_begin and not (yield from reader.has(self.call_begin)):
            return
        while (yield from self._call(reader, answer)) and not answer.ended:
            reader.hold()
            yield from reader.space()
            if (yield from reader.has(self.section_end)):
                reader.release()
                return
            if not (yield from reader.has(self.call_begin)):
                return

    def _call(self, reader: Reader, answer: Answer) -> Steps[bool]:
        """Read a call after its mark; False if it is none."""
        name, fence = yield from self._head(reader)
        if not name:
            return False
        answer.call(name)
        yield from reader.space()
        if (yield from reader.peek()) == "{":
            yield from read_value(reader, answer.arguments)
            yield from reader.space()
            yield from reader.has(fence)
            yield from reader.space()
            yield from reader.has(self.call_end)
        elif not (yield from reader.until(Marks(self.call_end), answer.arguments)):
            return False
        answer.end_call()
        return True

    @abstractmethod
    def _head(self, reader: Reader) -> Steps[tuple[str, str]]:
        """The call's name, "" if it has none, and what follows its arguments."""


class DeepSeek(MarkedCalls):
    """DeepSeek V3 and R1 put the arguments into a block of code after the name's line, V3.1 right after the mark."""

    name = "deepseek"
    call_begin = "<｜tool▁call▁begin｜>"
    call_end = "<｜tool▁call▁end｜>"
    section_end = "<｜tool▁calls▁end｜>"
    begins = ("<｜tool▁calls▁begin｜>", call_begin)
    tokens = ("<｜tool▁sep｜>", call_end, section_end)

    def _head(self, reader: Reader) -> Steps[tuple[str, str]]:
        name = yield from reader.run(_WORD)
        if not (yield from reader.has("<｜tool▁sep｜>")):
            return "", ""
        if (yield from reader.peek()) == "{":
            return name, ""
        line = (yield from reader.run(_LINE)).strip()
        if not (yield from reader.space()):
            return "", ""
        fenced = yield from reader.has("```json")
        return line or name, "```" if fenced else ""  # V3: the first word is the type of the tool


class Kimi(MarkedCalls):
    """`<|tool_call_begin|>functions.name:0<|tool_call_argument_begin|>{...}<|tool_call_end|>`: Kimi K2."""

    name = "kimi"
    call_begin = "<|tool_call_begin|>"
    call_end = "<|tool_call_end|>"
    section_end = "<|tool_calls_section_end|>"
    begins = ("<|tool_calls_section_begin|>", call_begin)
    tokens = ("<|tool_call_argument_begin|>", call_end, section_end)

    def _head(self, reader: Reader) -> Steps[tuple[str, str]]:
        yield from reader.space()
        name = yield from reader.run(_WORD)
        yield from reader.space()
        if not (yield from reader.has("<|tool_call_argument_begin|>")):
            return "", ""
        return name.removeprefix("functions.").partition(":")[0], ""
