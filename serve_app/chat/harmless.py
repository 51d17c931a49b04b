"""Messages and options made harmless: no text in them can begin or end one of some given tokens.

The prompts that a chat gives in both forms have the same tokens of that kind, unless a text has made one. Knows no
template.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from serve_app.chat.conversation import ChatMessage
from serve_app.chat.options import ChatOptions
from serve_app.chat.texts import with_message_texts, with_tool_texts

_SCHEMA_WORDS = frozenset(
    (
        *("type", "properties", "items", "required", "enum", "description", "additionalProperties", "anyOf", "oneOf"),
        *("allOf", "const", "default", "format", "title", "nullable", "object", "string", "number", "integer"),
        *("boolean", "array", "null"),
    )
)
"""Words of JSON Schema, by which templates choose how to write a tool. They stay as they are."""


class Disarmed:
    """Makes harmless for one set of tokens."""

    def __init__(self, tokens: Iterable[str]) -> None:
        named = tuple(tokens)
        edges = {edge for token in named for edge in (token[0], token[-1])}
        edges |= {changed for edge in edges for changed in (edge.lower(), edge.upper())}
        self._longest = max(map(len, named), default=0)
        self._insides = "\0".join(named).lower()
        self._filler = next((letter for letter in "xqzjkvwygbpfmhducnrstloaie" if letter not in edges), "x")
        self._harmless = str.maketrans(dict.fromkeys("".join(edges), self._filler))

    def message(self, message: ChatMessage) -> ChatMessage:
        """The message made harmless; an equal one if it is harmless already.

        Only characters that a token begins or ends with are replaced by a filler, because templates drop or refuse
        empty messages, and some look for words in them ("/no_think"). A text that is the inside of a token ("user" in
        "<|user|>") is replaced wholly.
        """
        return with_message_texts(message, self._text) if self._longest else message

    def options(self, options: ChatOptions) -> ChatOptions:
        """The options with the strings among the template's variables, and the tools, made harmless."""
        if not self._longest:
            return options
        variables = {
            name: self._text(value) if isinstance(value, str) else value for name, value in options.variables.items()
        }
        tools = tuple(with_tool_texts(tool, self._schema_text) for tool in options.tools)
        return replace(options, variables=variables, tools=tools)

    def _schema_text(self, text: str) -> str:
        return text if text in _SCHEMA_WORDS else self._text(text)

    def _text(self, text: str) -> str:
        inner = text.strip()
        if inner and len(inner) <= self._longest and inner.lower() in self._insides:
            text = text.replace(inner, self._filler * len(inner))
        return text.translate(self._harmless)
