"""Turn markers that are ordinary text: `[INST]`, `<|user|>` where it is no token of its own, `### Instruction:`.

No tokenizer can keep such a marker in a message from being read as a turn, so messages that contain one are refused or
the marker is broken. Promises that only distinctive text counts as a marker: in brackets, or after a run of hashes.
Plain words ("USER:", "Human:") don't count, or nobody could write about a user. Knows no Jinja.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Literal

from serve_app.chat.conversation import ChatMessage, Role
from serve_app.chat.marks import alternatives
from serve_app.chat.options import ChatOptions, Tool
from serve_app.chat.prompt_error import PromptError
from serve_app.chat.template_style import PROBE_TEXT, probe_turns
from serve_app.chat.texts import tool_texts, with_tool_texts
from serve_app.chat.tokenizer import ChatTokenizer

_ZERO_WIDTH_JOINER = "\u200d"
SENTINEL = "serve_app-probe"
"""A text whose place in a rendered chat shows what the template writes around it."""
_MARKER = re.compile(
    r"[<\[{|｜]+/?[^<>\[\]{}|｜\n]{1,40}[>\]}|｜]+"  # [INST], [/INST], <|user|>, <<SYS>>
    r"|#{2,}[ \t]*[^\s#:][^\n#:]{0,40}:?"  # "### Instruction:", on a line of its own or before the text
)


class TurnMarkers:
    """The markers of one chat format, and what becomes of them in a message."""

    def __init__(
        self, markers: Iterable[str], tokenizer: ChatTokenizer, *, policy: Literal["reject", "escape"], owner: str
    ) -> None:
        """`owner`: what the markers belong to, for error messages ("the Llama-2 chat format")."""
        self.markers = tuple(markers)
        self._tokenizer = tokenizer
        self._policy = policy
        self._owner = owner
        self._patterns = [_pattern(tokenizer, marker) for marker in self.markers]

    def guarded(self, message: ChatMessage, where: str) -> ChatMessage:
        """The message with its markers broken by a zero-width joiner; `where` is the field of its text.

        An assistant's message keeps its markers: they are the model's own words, sent back. In a tool's result they are
        broken under `reject` too: the caller did not write it. Raises `PromptError` under `reject`, and for text that
        only the tokenizer's normalisation turns into a marker.
        """
        if message.role == "assistant" or not any(self.count(message.content)):
            return message
        breaks = self._policy == "escape" or message.role == "tool"
        return replace(message, content=self._guarded(message.content, where, breaks=breaks))

    def guarded_chat(
        self, messages: Sequence[ChatMessage], options: ChatOptions
    ) -> tuple[list[ChatMessage], ChatOptions]:
        """The messages, and the tools among the options, with their markers broken. Raises as `guarded` does."""
        safe = [self.guarded(message, f"messages[{index}].content") for index, message in enumerate(messages)]
        if not self.markers:
            return safe, options
        tools = tuple(self._guarded_tool(tool, f"tools[{index}]") for index, tool in enumerate(options.tools))
        return safe, replace(options, tools=tools)

    def _guarded_tool(self, tool: Tool, where: str) -> Tool:
        if not any(self.count("\n".join(tool_texts(tool)))):
            return tool
        return with_tool_texts(tool, lambda text: self._guarded(text, where, breaks=self._policy == "escape"))

    def _guarded(self, text: str, where: str, *, breaks: bool) -> str:
        if breaks:
            for marker in self.markers:
                text = text.replace(marker, marker[0] + _ZERO_WIDTH_JOINER + marker[1:])
        for marker, count in zip(self.markers, self.count(text), strict=True):
            if count:
                raise PromptError(
                    f"{where} contains {marker}, which is reserved by {self._owner}: it would be read as a turn. "
                    "Write it in another way.",
                    param=where,
                )
        return text

    def count(self, text: str) -> tuple[int, ...]:
        """How often each marker is in the text as the tokenizer reads it."""
        if not self._patterns:
            return ()
        read = self._tokenizer.normalized(text)
        return tuple(len(pattern.findall(read)) for pattern in self._patterns)


def find_turn_markers(show: Callable[[Sequence[ChatMessage]], str], control_tokens: Iterable[str]) -> tuple[str, ...]:
    """The markers that a template writes for each turn, or next to a system text.

    `show` gives the text that the template makes of a trial, or "" when it refuses it. Control tokens don't count: no
    text can become one. Text that is written once for any number of turns, such as a preamble's headings, doesn't count
    either. A heading next to a system text counts only where turns have headings too.
    """
    parting = alternatives(control_tokens)

    def trial(*roles: Role) -> list[str]:
        """The template's own text before, between and after the messages, with line breaks for control tokens."""
        shown = show([ChatMessage(role, SENTINEL) for role in roles])
        return (parting.sub("\n", shown) if parting else shown).split(SENTINEL)

    once, twice = Counter(_found(trial("user"))), Counter(_found(trial("user", "assistant", "user")))
    markers = [marker for marker in twice if twice[marker] > once[marker]]
    headings = any(marker.startswith("#") for marker in markers)
    before, *after = trial("system", "user")
    if len(after) == 2:
        for marker in _found([before, after[0]]):
            touches = before.rstrip().endswith(marker) or after[0].lstrip().startswith(marker)
            if touches and marker not in markers and (headings or not marker.startswith("#")):
                markers.append(marker)
    return tuple(markers)


def find_tool_markers(show: Callable[[Sequence[ChatMessage]], str], control_tokens: Iterable[str]) -> tuple[str, ...]:
    """The markers that a template writes around each tool call and each result, e.g. `<tool_response>`.

    `show` and `control_tokens` are as for `find_turn_markers`.
    """
    parting = alternatives(control_tokens)

    def trial(turns: int) -> list[str]:
        shown = show(probe_turns() * turns)
        return PROBE_TEXT.split(parting.sub("\n", shown) if parting else shown)

    once, twice = Counter(_found(trial(1))), Counter(_found(trial(2)))
    return tuple(marker for marker in twice if twice[marker] > once[marker] and '"' not in marker)


def _found(pieces: Iterable[str]) -> list[str]:
    found = (match.strip() for piece in pieces for match in _MARKER.findall(piece))
    return [marker for marker in found if any(character.isalpha() for character in marker)]


def _pattern(tokenizer: ChatTokenizer, marker: str) -> re.Pattern[str]:
    """Matches the marker as it is inside a normalised text; a tokenizer may put a space before the text it is given."""
    read = tokenizer.normalized(f"x{marker}").partition("x")[2]
    if not read:  # normalisation removes the marker: it can't occur
        return re.compile(r"(?!)")
    # With more hashes, or a longer last word, it would be other tokens and not this marker.
    before, after = "(?<!#)" if read.startswith("#") else "", r"(?!\w)" if read[-1].isalnum() else ""
    return re.compile(before + re.escape(read) + after)
