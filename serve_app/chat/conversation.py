"""The messages of a chat as callers send them, checked: known roles, safe names, valid text.

Promises that only `str` fields go on to a template: a dict's keys can't be told from the template's own text. Knows no
tokenizer and no template.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

from serve_app.chat.errors import PromptError

Role = Literal["system", "developer", "user", "assistant"]
_ROLES: tuple[str, ...] = get_args(Role)
_FIELDS = frozenset({"role", "content", "name"})
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_TOOL_FIELDS = frozenset({"tool_calls", "tool_call_id", "function_call"})
_SHOWN_CHARACTERS = 40
"""How much of a caller's own wrong value an error repeats."""


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn."""

    role: Role
    content: str
    name: str | None = None


def parse_messages(raw: Sequence[Mapping[str, object]]) -> list[ChatMessage]:
    """The messages of a request, decoded from JSON.

    `content` is a string or a list of `{"type": "text", "text": ...}` parts, which are joined by newlines (as vLLM and
    llama.cpp do; so two parts can't join into one token either). A field that is null or an empty list counts as
    absent, because clients send back whole assistant messages (`"refusal": null`). Raises `PromptError`.
    """
    if not isinstance(raw, Sequence) or isinstance(raw, str | bytes) or not raw:
        raise PromptError("messages must be a list with at least one message.", param="messages")
    return [_parse_message(message, f"messages[{index}]") for index, message in enumerate(raw)]


def require_unicode(text: str, param: str) -> None:
    """Refuse text with a lone surrogate, which JSON can spell ("\\ud800") and no encoding can hold: `PromptError`."""
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{param} is not valid Unicode: character {error.start} is a lone surrogate.", param=param
        ) from error


def _parse_message(raw: object, where: str) -> ChatMessage:
    if not isinstance(raw, Mapping):
        raise PromptError(f"{where} must be an object with role and content.", param=where)
    given = {key: value for key, value in raw.items() if value is not None and value != []}
    role = _parse_role(given.get("role"), f"{where}.role")
    for key in given.keys() - _FIELDS:
        if key in _TOOL_FIELDS:
            raise PromptError(f"{where}.{key}: tool calls are not served by this server.", param=f"{where}.{key}")
        raise PromptError(f"{where} has an unknown field {_shown(key)}; known are role, content, name.", param=where)
    if "content" not in given and raw.get("content") is None:
        raise PromptError(f"{where} has no content.", param=f"{where}.content")
    return ChatMessage(
        role, _parse_content(raw["content"], f"{where}.content"), _parse_name(given.get("name"), f"{where}.name")
    )


def _parse_role(raw: object, where: str) -> Role:
    if raw in ("tool", "function"):
        raise PromptError(f"{where}: {raw} messages are not served by this server.", param=where)
    if not isinstance(raw, str) or raw not in _ROLES:
        raise PromptError(f"{where} must be one of {', '.join(_ROLES)}; it is {_shown(raw)}.", param=where)
    return cast(Role, raw)


def _parse_name(raw: object, where: str) -> str | None:
    if raw is None:
        return None
    if not isinstance(raw, str) or _NAME.fullmatch(raw) is None:
        raise PromptError(f"{where} must be 1 to 64 letters, digits, underscores or hyphens.", param=where)
    return raw


def _parse_content(raw: object, where: str) -> str:
    if isinstance(raw, str):
        require_unicode(raw, where)
        return raw
    if not isinstance(raw, Sequence) or isinstance(raw, bytes):
        raise PromptError(f"{where} must be a string or a list of text parts.", param=where)
    return "\n".join(_parse_part(part, f"{where}[{index}]") for index, part in enumerate(raw))


def _parse_part(raw: object, where: str) -> str:
    if not isinstance(raw, Mapping):
        raise PromptError(f'{where} must be an object such as {{"type": "text", "text": "Hi"}}.', param=where)
    if raw.get("type") != "text":
        raise PromptError(f"{where}: this model takes text parts only, not {_shown(raw.get('type'))}.", param=where)
    text = raw.get("text")
    if not isinstance(text, str):
        raise PromptError(f"{where}.text must be a string.", param=f"{where}.text")
    for key in raw.keys() - {"type", "text"}:
        if raw[key] is not None:
            raise PromptError(f"{where} has an unknown field {_shown(key)}; known are type and text.", param=where)
    require_unicode(text, f"{where}.text")
    return text


def _shown(value: object) -> str:
    """A short, printable form: ascii() also spells lone surrogates, which a response could not carry."""
    if not isinstance(value, str):
        return "null" if value is None else f"of type {type(value).__name__}"
    return ascii(value if len(value) <= _SHOWN_CHARACTERS else f"{value[:_SHOWN_CHARACTERS]}...")
