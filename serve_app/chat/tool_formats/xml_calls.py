"""Calls as tags, with one element for each argument: Qwen3-Coder, GLM 4.5, MiniMax M2.

An argument is a text unless the tool's schema says otherwise. A text becomes a JSON string as it comes, anything else
once it is complete.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from serve_app.chat.answer_parser import Answer, ToolFormat
from serve_app.chat.reading import Marks, Reader, Steps, Tell
from serve_app.chat.tool_formats.json_calls import read_marked
from serve_app.chat.tool_formats.json_text import escaped, is_json, read_value

_NAME = re.compile(r"[^<>\"\s]*")

ArgumentTypes = Mapping[str, Mapping[str, bool]]
"""Tool -> argument -> whether its schema makes it a text."""


@dataclass(frozen=True, slots=True)
class Tags:
    """The marks of one format."""

    begins: tuple[str, ...]
    call: str
    """Before the name; empty where the section's begin is."""
    name_end: str
    key: str
    """Before an argument's name."""
    key_end: str
    value: str
    """Between `key_end` and the value; may be empty."""
    value_end: str
    call_end: str
    section_end: str


QWEN3_CODER = Tags(
    ("<tool_call>", "<function="),
    *("<function=", ">", "<parameter=", ">", "", "</parameter>", "</function>", "</tool_call>"),
)
MINIMAX = Tags(
    ("<minimax:tool_call>",),
    *('<invoke name="', '">', '<parameter name="', '">', "", "</parameter>", "</invoke>", "</minimax:tool_call>"),
)
GLM = Tags(("<tool_call>",), "", "", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "", "</tool_call>")


class XmlCalls(ToolFormat):
    """Calls with these tags."""

    def __init__(self, name: str, tags: Tags, types: ArgumentTypes) -> None:
        """`types`: of the request's tools."""
        self.name = name
        self.begins = tags.begins
        self.tokens = (tags.value_end, tags.call_end, tags.section_end, tags.key_end, tags.key, tags.value)
        self._tags = tags
        self._types = types

    def read(self, reader: Reader, answer: Answer, mark: str) -> Steps[None]:
        """See `ToolFormat`."""
        tags = self._tags
        yield from reader.space()
        if mark != tags.call and (yield from reader.peek()) == "{":
            yield from read_marked(reader, answer, tags.section_end)
            return
        if mark != tags.call and not (yield from reader.has(tags.call)):
            return
        while (yield from self._call(reader, answer)) and not answer.ended:
            reader.hold()
            yield from reader.space()
            if (yield from reader.has(tags.section_end)):
                reader.release()
                return
            if not tags.call or not (yield from reader.has(tags.call)):
                return

    def _call(self, reader: Reader, answer: Answer) -> Steps[bool]:
        """Read a call; False if it is none, or broken."""
        tags = self._tags
        name = yield from reader.run(_NAME)
        if not name or not (yield from reader.has(tags.name_end)):
            return False
        if not tags.name_end and (yield from reader.peek()) not in ("\n", "<"):
            return False
        answer.call(name)
        yield from reader.space()
        if (yield from reader.peek()) == "{":
            return (yield from self._json(reader, answer))
        start = "{"
        while True:
            yield from reader.space()
            if not (yield from reader.has(tags.key)):
                break
            key = yield from reader.run(_NAME)
            yield from reader.has(tags.key_end)
            yield from reader.space()
            yield from reader.has(tags.value)
            answer.arguments(f"{start}{json.dumps(key, ensure_ascii=False)}: ")
            start = ", "
            is_text = self._types.get(name, {}).get(key, True)
            if not (yield from self._value(reader, answer.arguments, is_text=is_text)):
                return False
        whole = bool(tags.call_end) and (yield from reader.has(tags.call_end))
        if not whole and reader.cut_off(tags.key, tags.call_end, tags.section_end):
            return False
        if start != "{":
            answer.arguments("}")
        answer.end_call()
        return whole or not tags.call_end

    def _json(self, reader: Reader, answer: Answer) -> Steps[bool]:
        """Read arguments as JSON, and the end of the call; False if they are broken, or nothing can follow."""
        if not (yield from read_value(reader, answer.arguments)):
            return False
        yield from reader.space()
        yield from reader.has(self._tags.call_end)
        answer.end_call()
        return True

    def _value(self, reader: Reader, tell: Tell, *, is_text: bool) -> Steps[bool]:
        """Read a value and its end; False if the text ends before."""
        end = Marks(self._tags.value_end)
        yield from reader.has("\n")
        if is_text:
            tell('"')
            whole = yield from reader.until(end, _WithoutLastNewline(tell))
            tell('"' if whole else "")
            return bool(whole)
        pieces: list[str] = []
        whole = yield from reader.until(end, pieces.append)
        text = "".join(pieces).strip()
        tell(text if is_json(text) else f'"{escaped(text)}"')
        return bool(whole)


class _WithoutLastNewline:
    """Tells a text inside a JSON string, but for a newline at its end."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._newline = ""

    def __call__(self, text: str) -> None:
        said = self._newline + text
        self._newline = "\n" if said.endswith("\n") else ""
        self._tell(escaped(said.removesuffix("\n")))


def argument_types(tools: Mapping[str, Mapping[str, object]]) -> dict[str, dict[str, bool]]:
    """The types of tools' arguments, from their names and schemas."""
    types: dict[str, dict[str, bool]] = {}
    for name, schema in tools.items():
        properties = schema.get("properties")
        types[name] = {
            key: not isinstance(each, Mapping) or _is_text(each)
            for key, each in (properties.items() if isinstance(properties, Mapping) else ())
        }
    return types


def _is_text(schema: Mapping[str, object]) -> bool:
    """Whether a value of this schema is a text, as far as the schema itself says."""
    if "type" in schema:
        return schema["type"] == "string"
    values = schema.get("enum")
    return isinstance(values, list) and all(isinstance(value, str) for value in values)
