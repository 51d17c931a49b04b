"""The messages of a chat as callers send them, checked: known roles, safe names, valid text.

Promises that nothing goes on to a template but texts, and the arguments of tool calls as checked JSON. Knows no
tokenizer and no template.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

from serve_app.chat.json_values import JsonLimit
from serve_app.chat.prompt_error import PromptError
from serve_app.chat.tool_calls import MAX_NAME_CHARS, ToolCall, parse_call_id, parse_tool_calls
from serve_app.chat.unicode import require_unicode, shown

Role = Literal["system", "developer", "user", "assistant", "tool"]
_ROLES: tuple[str, ...] = get_args(Role)
_FIELDS = frozenset({"role", "content", "name"})
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NOT_SERVED = {
    "function_call": "send tool_calls instead, OpenAI's newer form.",
    "audio": "audio is not served by this server.",
    "images": "images are not served by this server.",
    "prefix": "send continue_final_message with the request instead.",
    "partial": "send continue_final_message with the request instead.",
}
"""Fields of other servers' messages that would change the prompt -> what the error says."""
OFF_VALUES: tuple[object, ...] = (None, False, "", [], {})
"""An unknown field with one of these asks for nothing."""
_REASONING_PARTS = frozenset({"thinking", "redacted_thinking", "reasoning"})
"""Types of the parts of an assistant's content that hold its reasoning."""
_REASONING_FIELDS = ("reasoning_content", "reasoning")
"""Where an assistant's message has its reasoning; a message with both has it twice."""


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn."""

    role: Role
    content: str
    name: str | None = None
    reasoning: str = ""
    """How an assistant came to the content and the calls."""
    tool_calls: tuple[ToolCall, ...] = ()
    """Of an assistant, who may have said nothing else: then `content` is empty."""
    tool_call_id: str | None = None
    """The call that a tool's message answers."""


Unknown = Callable[[str, str], None]
"""Called for each unknown field, with its place (`messages[3]`) and its name."""


def refuse_unknown(where: str, field: str) -> None:
    """The strict kind of `Unknown`: raises `PromptError`."""
    raise PromptError(f"{where} has an unknown field {shown(field)}.", param=where, code="unknown_parameter")


def parse_messages(
    raw: Sequence[Mapping[str, object]], unknown: Unknown = refuse_unknown, *, keep_reasoning: bool = False
) -> list[ChatMessage]:
    """The messages of a request, decoded from JSON.

    `content` is a string or a list of `{"type": "text", "text": ...}` parts, which are joined by newlines (as vLLM and
    llama.cpp do; so two parts can't join into one token either). A field that is null or empty counts as absent,
    because clients send back whole assistant messages (`"refusal": null`). `unknown` is called for each unknown field,
    and without `keep_reasoning` for an assistant's reasoning too. Raises `PromptError`.
    """
    if not isinstance(raw, Sequence) or isinstance(raw, str | bytes) or not raw:
        raise PromptError("messages must be a list with at least one message.", param="messages")
    reader = _Reader(unknown, keep_reasoning)
    return [reader.message(message, f"messages[{index}]") for index, message in enumerate(raw)]


class _Reader:
    """Reads the messages of one request."""

    def __init__(self, unknown: Unknown, keep_reasoning: bool) -> None:
        self._unknown = unknown
        self._keeps_reasoning = keep_reasoning
        self._limit = JsonLimit()

    def message(self, raw: object, where: str) -> ChatMessage:
        """One message."""
        if not isinstance(raw, Mapping):
            raise PromptError(f"{where} must be an object with role and content.", param=where)
        role = _parse_role(raw.get("role"), f"{where}.role")
        self._judge_fields(raw, role, where)
        calls: tuple[ToolCall, ...] = ()
        if role == "assistant" and raw.get("tool_calls"):
            calls = parse_tool_calls(raw["tool_calls"], f"{where}.tool_calls", self._unknown, self._limit)
        thoughts: list[str] = []
        if raw.get("content") is not None:
            content = self._content(raw["content"], f"{where}.content", role, thoughts)
        elif calls:
            content = ""
        else:
            raise PromptError(f"{where} has no content.", param=f"{where}.content")
        call_id = parse_call_id(raw.get("tool_call_id"), f"{where}.tool_call_id") if role == "tool" else None
        reasoning = self._reasoning(raw, where) if role == "assistant" else ""
        name = _parse_name(raw.get("name"), f"{where}.name", role)
        return ChatMessage(role, content, name, reasoning or "\n".join(thoughts), calls, call_id)

    def _judge_fields(self, raw: Mapping[str, object], role: Role, where: str) -> None:
        """Refuse fields that can't be served, and report those that are not known."""
        known = _FIELDS
        if role == "assistant":
            known |= {"tool_calls"}
            if self._keeps_reasoning:
                known = known.union(_REASONING_FIELDS)
        elif role == "tool":
            known |= {"tool_call_id"}
        for key, value in raw.items():
            if key in known or value in OFF_VALUES:
                continue
            if key == "tool_calls":
                message = f"{where}.tool_calls: only an assistant's message has tool calls."
                raise PromptError(message, param=f"{where}.tool_calls")
            if key in _NOT_SERVED:
                message = f"{where}.{key}: {_NOT_SERVED[key]}"
                raise PromptError(message, param=f"{where}.{key}", code="unsupported_parameter")
            self._unknown(where, key)

    def _reasoning(self, raw: Mapping[str, object], where: str) -> str:
        if not self._keeps_reasoning:
            return ""
        for field in _REASONING_FIELDS:
            text = raw.get(field)
            if isinstance(text, str) and text:
                require_unicode(text, f"{where}.{field}")
                return text
        return ""

    def _content(self, raw: object, where: str, role: Role, thoughts: list[str]) -> str:
        """The text of a content; its reasoning, if kept, is added to `thoughts`."""
        if isinstance(raw, str):
            require_unicode(raw, where)
            return raw
        if not isinstance(raw, Sequence) or isinstance(raw, bytes):
            raise PromptError(f"{where} must be a string or a list of text parts.", param=where)
        texts = (self._part(part, f"{where}[{index}]", role, thoughts) for index, part in enumerate(raw))
        return "\n".join(text for text in texts if text is not None)

    def _part(self, raw: object, where: str, role: Role, thoughts: list[str]) -> str | None:
        """The part's text; None for a part with reasoning."""
        if not isinstance(raw, Mapping):
            raise PromptError(f'{where} must be an object such as {{"type": "text", "text": "Hi"}}.', param=where)
        kind = raw.get("type")
        if role == "assistant" and isinstance(kind, str) and kind in _REASONING_PARTS:
            thought = raw.get(kind) or raw.get("text")
            if self._keeps_reasoning and isinstance(thought, str):
                require_unicode(thought, where)
                thoughts.append(thought)
            else:
                self._unknown(where, kind)
            return None
        if kind != "text":
            raise PromptError(f"{where}: this model takes text parts only, not {shown(kind)}.", param=where)
        text = raw.get("text")
        if not isinstance(text, str):
            raise PromptError(f"{where}.text must be a string.", param=f"{where}.text")
        for key, value in raw.items():
            if key not in ("type", "text") and value not in OFF_VALUES:
                self._unknown(where, key)
        require_unicode(text, f"{where}.text")
        return text


def _parse_role(raw: object, where: str) -> Role:
    if raw == "function":
        message = f"{where}: send tool messages instead, OpenAI's newer form of function messages."
        raise PromptError(message, param=where)
    if not isinstance(raw, str) or raw not in _ROLES:
        raise PromptError(f"{where} must be one of {', '.join(_ROLES)}; it is {shown(raw)}.", param=where)
    return cast(Role, raw)


def _parse_name(raw: object, where: str, role: Role) -> str | None:
    if raw is None or raw == "":
        return None
    if role == "tool" and isinstance(raw, str) and len(raw) <= MAX_NAME_CHARS:  # the name of a tool, as in a call
        require_unicode(raw, where)
        return raw
    if not isinstance(raw, str) or _NAME.fullmatch(raw) is None:
        raise PromptError(f"{where} must be 1 to 64 letters, digits, underscores or hyphens.", param=where)
    return raw
