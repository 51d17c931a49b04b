"""Formats whose calls are JSON objects: Hermes and Qwen, Llama 3, Mistral, and the one for models without a format.

The arguments are passed on in the model's own characters.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from serve_app.chat.answer_parser import Answer, ToolFormat
from serve_app.chat.reading import Reader, Steps, Tell
from serve_app.chat.tool_formats.json_text import encodable, read_string, read_value, value_of

_ARGUMENTS = frozenset({"arguments", "parameters"})
_BESIDE = frozenset({"type", "id"})
"""Other keys that calls have. Their values are short."""
_NAME = re.compile(r"[\w.\-]*")
_SEPARATORS = re.compile(r"[\s;,]*")
_BRACES = re.compile(r"[\s}]*")


class CallReader:
    """Reads the call, or the calls, that one JSON object is."""

    def __init__(
        self, reader: Reader, answer: Answer, offered: Collection[str] | None = None, *, listed: bool = False
    ) -> None:
        """`offered`: an object is a call only if it names one of these tools, and has no key that calls don't have: a
        text may be JSON, too, and must not wait for its end. None: any name and any key will do.

        `listed`: it stands in a list of calls, and has none itself.
        """
        self._reader = reader
        self._answer = answer
        self._offered = offered
        self._listed = listed
        self._named = False
        self._arguments: list[str] = []
        """Arguments that came before the name."""

    def read(self) -> Steps[bool]:
        """Read an object; False if it is no call, or broken.

        Where a call has begun, the reader then holds what is left of a broken object, unless the text ends in it.
        """
        before = self._answer.calls
        whole = yield from self._object()
        truncated = not whole and not (yield from self._reader.peek())
        if self._named and not truncated:
            self._answer.end_call()
        if self._answer.calls > before and (whole or truncated):
            self._reader.release()
        return whole and self._answer.calls > before

    def _object(self, *, nested: bool = False) -> Steps[bool]:
        reader = self._reader
        if not (yield from reader.has("{")):
            return False
        while True:
            yield from reader.space()
            key = yield from read_string(reader)
            yield from reader.space()
            if key is None or not (yield from reader.has(":")):
                return key is None and (yield from reader.has("}"))
            yield from reader.space()
            if not (yield from self._value(key, nested=nested)):
                return False
            yield from reader.space()
            if not (yield from reader.has(",")):
                return (yield from reader.has("}"))

    def _value(self, key: str, *, nested: bool) -> Steps[bool]:
        first = yield from self._reader.peek()
        if key == "name" and not self._named:
            return (yield from self._name())
        if key in _ARGUMENTS:
            return (yield from self._read_arguments())
        if key == "function" and first == "{" and not nested:  # OpenAI's own nesting
            return (yield from self._object(nested=True))
        if key == "tool_calls" and first == "[" and not (nested or self._listed):
            return (yield from read_array(self._reader, self._answer, self._offered))
        if self._offered is not None and not self._named and (key not in _BESIDE or first in "{["):
            return False
        return (yield from read_value(self._reader, _nowhere))

    def _name(self) -> Steps[bool]:
        name = yield from read_string(self._reader)
        if not name or (self._offered is not None and name not in self._offered):
            return False
        self._named = True
        self._answer.call(name)
        self._reader.hold()
        for piece in self._arguments:
            self._answer.arguments(piece)
        return True

    def _read_arguments(self) -> Steps[bool]:
        if not self._named:
            return (yield from self._arguments_to(self._arguments.append))
        self._reader.release()
        whole = yield from self._arguments_to(self._answer.arguments)
        self._reader.hold()
        return whole

    def _arguments_to(self, tell: Tell) -> Steps[bool]:
        if (yield from self._reader.peek()) == "{":
            return (yield from read_value(self._reader, tell))
        pieces: list[str] = []
        whole = yield from read_value(self._reader, pieces.append)
        if text := _as_object("".join(pieces)):
            tell(text)
        return whole


def read_array(reader: Reader, answer: Answer, offered: Collection[str] | None = None) -> Steps[bool]:
    """Read an array of calls; False if it is none, or broken. The reader then holds what is left, as `CallReader`."""
    if not (yield from reader.has("[")):
        return False
    while True:
        yield from reader.space()
        if not (yield from CallReader(reader, answer, offered, listed=True).read()) or answer.ended:
            return False
        reader.hold()
        yield from reader.space()
        if not (yield from reader.has(",")):
            whole = yield from reader.has("]")
            if whole:
                reader.release()
            return whole


def read_marked(reader: Reader, answer: Answer, end: str) -> Steps[None]:
    """Read a call, or none, after a mark and up to the mark `end`, which may be missing."""
    if (yield from CallReader(reader, answer).read()) and not answer.ended:
        yield from reader.run(_BRACES)
        yield from reader.has(end)


def read_bare(reader: Reader, answer: Answer, offered: Collection[str]) -> Steps[None]:
    """Read calls without marks, if they name tools of the request."""
    while (yield from CallReader(reader, answer, offered).read()) and not answer.ended:
        reader.hold()
        yield from reader.run(_SEPARATORS)


def _as_object(text: str) -> str:
    """The text of arguments that are no object: some models write the object as a string, or null for none."""
    try:
        value = value_of(text)
    except ValueError:
        return text
    if value is None or value == "":
        return ""
    return encodable(value) if isinstance(value, str) and value.lstrip().startswith("{") else text


def _nowhere(text: str) -> None:
    """Takes a value that belongs to no part."""


class Hermes(ToolFormat):
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`: Hermes, Qwen 2.5 and 3."""

    name = "hermes"
    begins = ("<tool_call>",)
    tokens = ("</tool_call>",)

    def read(self, reader: Reader, answer: Answer, mark: str) -> Steps[None]:
        """See `ToolFormat`."""
        yield from reader.space()
        yield from read_marked(reader, answer, "</tool_call>")


class Llama3Json(ToolFormat):
    """`{"name": ..., "parameters": {...}}`, the whole answer or after `<|python_tag|>`: Llama 3.1 and 3.2.

    More calls follow after `;`. Nothing marks them, so only an object that names a tool of the request is a call.
    """

    name = "llama3_json"
    begins = ("<|python_tag|>",)
    bare = "{"
    end_tokens = ("<|eom_id|>",)

    def __init__(self, offered: Collection[str]) -> None:
        self._offered = offered

    def read(self, reader: Reader, answer: Answer, mark: str) -> Steps[None]:
        """See `ToolFormat`."""
        yield from reader.space()
        yield from read_bare(reader, answer, self._offered)


class Mistral(ToolFormat):
    """`[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`, and from v11 on `[TOOL_CALLS]name[ARGS]{...}`."""

    name = "mistral"
    begins = ("[TOOL_CALLS]",)
    tokens = ("[ARGS]", "[CALL_ID]")

    def read(self, reader: Reader, answer: Answer, mark: str) -> Steps[None]:
        """See `ToolFormat`."""
        yield from reader.space()
        first = yield from reader.peek()
        if first == "{":
            yield from CallReader(reader, answer).read()
        elif first == "[":
            yield from read_array(reader, answer)
        elif name := (yield from reader.run(_NAME)):
            yield from self._named(reader, answer, name)

    def _named(self, reader: Reader, answer: Answer, name: str) -> Steps[None]:
        if (yield from reader.has("[CALL_ID]")):
            yield from reader.run(_NAME)
        if not (yield from reader.has("[ARGS]")) and (yield from reader.peek()) != "{":
            return
        answer.call(name)
        yield from reader.space()
        if (yield from read_value(reader, answer.arguments)) or (yield from reader.peek()):
            answer.end_call()


class GenericJson(ToolFormat):
    """Calls of models without a format of their own: Hermes's, which the prompt asks for, or any JSON.

    That is an object with `tool_calls`, a call, or an array of calls, bare or in a block of code. Without a mark only
    an object that names a tool of the request is a call.
    """

    name = "generic_json"
    begins = ("<tool_call>", "```json")
    bare = "{["
    tokens = ("</tool_call>",)

    def __init__(self, offered: Collection[str]) -> None:
        self._offered = offered

    def read(self, reader: Reader, answer: Answer, mark: str) -> Steps[None]:
        """See `ToolFormat`."""
        yield from reader.space()
        offered = None if mark == "<tool_call>" else self._offered
        if (yield from reader.peek()) == "[":
            whole = yield from read_array(reader, answer, offered)
        else:
            whole = yield from CallReader(reader, answer, offered).read()
        if whole and mark and not answer.ended:
            yield from reader.run(_BRACES)
            yield from reader.has("```" if mark == "```json" else "</tool_call>")
