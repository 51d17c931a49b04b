"""The messages of a chat as callers send them, checked: known roles, safe names, valid text.

Promises that only `str` fields go on to a template: when a template prints a dict, its keys can't be told from the
template's own text. Knows no tokenizer and no template.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

from serve_app.chat.prompt_error import PromptError

Role = Literal["system", "developer", "user", "assistant"]
_ROLES: tuple[str, ...] = get_args(Role)
_FIELDS = frozenset({"role", "content", "name"})
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NOT_SERVED = {
    "tool_calls": "tool calls are not served by this server.",
    "tool_call_id": "tool calls are not served by this server.",
    "function_call": "tool calls are not served by this server.",
    "audio": "audio is not served by this server.",
    "images": "images are not served by this server.",
    "prefix": "send continue_final_message with the request instead.",
    "partial": "send continue_final_message with the request instead.",
}
"""Fields of other servers' messages that would change the prompt -> what the error says."""
_OFF: tuple[object, ...] = (None, False, "", [], {})
_REASONING_PARTS = frozenset({"thinking", "redacted_thinking", "reasoning"})
"""Types of the parts of an assistant's content that hold its reasoning."""
_SHOWN_CHARACTERS = 40
"""How much of a caller's own wrong value an error repeats."""


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn."""

    role: Role
    content: str
    name: str | None = None


Unknown = Callable[[str, str], None]
"""Called for each unknown field, with its place (`messages[3]`) and its name."""


def refuse_unknown(where: str, field: str) -> None:
    """The strict kind of `Unknown`: raises `PromptError`."""
    raise PromptError(f"{where} has an unknown field {_shown(field)}.", param=where, code="unknown_parameter")


def parse_messages(raw: Sequence[Mapping[str, object]], unknown: Unknown = refuse_unknown) -> list[ChatMessage]:
    """The messages of a request, decoded from JSON.

    `content` is a string or a list of `{"type": "text", "text": ...}` parts, which are joined by newlines (as vLLM and
    llama.cpp do; so two parts can't join into one token either). A field that is null or empty counts as absent,
    because clients send back whole assistant messages (`"refusal": null`). `unknown` is called for each unknown field,
    also for an assistant's reasoning (`reasoning_content`). Raises `PromptError`.
    """
    if not isinstance(raw, Sequence) or isinstance(raw, str | bytes) or not raw:
        raise PromptError("messages must be a list with at least one message.", param="messages")
    return [_parse_message(message, f"messages[{index}]", unknown) for index, message in enumerate(raw)]


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


def _parse_message(raw: object, where: str, unknown: Unknown) -> ChatMessage:
    if not isinstance(raw, Mapping):
        raise PromptError(f"{where} must be an object with role and content.", param=where)
    role = _parse_role(raw.get("role"), f"{where}.role")
    for key, value in raw.items():
        if key in _FIELDS or value in _OFF:
            continue
        if key in _NOT_SERVED:
            message = f"{where}.{key}: {_NOT_SERVED[key]}"
            raise PromptError(message, param=f"{where}.{key}", code="unsupported_parameter")
        unknown(where, key)
    if raw.get("content") is None:
        raise PromptError(f"{where} has no content.", param=f"{where}.content")
    content = _parse_content(raw["content"], f"{where}.content", role, unknown)
    return ChatMessage(role, content, _parse_name(raw.get("name"), f"{where}.name"))


def _parse_role(raw: object, where: str) -> Role:
    if raw in ("tool", "function"):
        raise PromptError(f"{where}: {raw} messages are not served by this server.", param=where)
    if not isinstance(raw, str) or raw not in _ROLES:
        raise PromptError(f"{where} must be one of {', '.join(_ROLES)}; it is {_shown(raw)}.", param=where)
    return cast(Role, raw)


def _parse_name(raw: object, where: str) -> str | None:
    if raw is None or raw == "":
        return None
    if not isinstance(raw, str) or _NAME.fullmatch(raw) is None:
        raise PromptError(f"{where} must be 1 to 64 letters, digits, underscores or hyphens.", param=where)
    return raw


def _parse_content(raw: object, where: str, role: Role, unknown: Unknown) -> str:
    if isinstance(raw, str):
        require_unicode(raw, where)
        return raw
    if not isinstance(raw, Sequence) or isinstance(raw, bytes):
        raise PromptError(f"{where} must be a string or a list of text parts.", param=where)
    texts = (_parse_part(part, f"{where}[{index}]", role, unknown) for index, part in enumerate(raw))
    return "\n".join(text for text in texts if text is not None)


def _parse_part(raw: object, where: str, role: Role, unknown: Unknown) -> str | None:
    """The part's text; None for a reasoning part that `unknown` has accepted."""
    if not isinstance(raw, Mapping):
        raise PromptError(f'{where} must be an object such as {{"type": "text", "text": "Hi"}}.', param=where)
    kind = raw.get("type")
    if role == "assistant" and isinstance(kind, str) and kind in _REASONING_PARTS:
        unknown(where, kind)
        return None
    if kind != "text":
        raise PromptError(f"{where}: this model takes text parts only, not {_shown(kind)}.", param=where)
    text = raw.get("text")
    if not isinstance(text, str):
        raise PromptError(f"{where}.text must be a string.", param=f"{where}.text")
    for key, value in raw.items():
        if key not in ("type", "text") and value not in _OFF:
            unknown(where, key)
    require_unicode(text, f"{where}.text")
    return text


def _shown(value: object) -> str:
    """A short, printable form: ascii() also spells lone surrogates, which a response could not carry."""
    if not isinstance(value, str):
        return "null" if value is None else f"of type {type(value).__name__}"
    return ascii(value if len(value) <= _SHOWN_CHARACTERS else f"{value[:_SHOWN_CHARACTERS]}...")
