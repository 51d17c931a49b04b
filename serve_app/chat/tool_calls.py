"""The tool calls in an assistant's earlier messages, and the results that answer them.

Promises calls whose arguments are checked JSON objects, and results that stand in the order of their calls. Knows no
template.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from serve_app.chat.json_values import JsonLimit
from serve_app.chat.prompt_error import PromptError
from serve_app.chat.unicode import require_unicode, shown

_CALL_FIELDS = frozenset({"id", "type", "function"})
_FUNCTION_FIELDS = frozenset({"name", "arguments"})
MAX_NAME_CHARS = 256
"""Of a called function. A model may have called one that does not exist, so any other text is accepted."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the assistant made."""

    id: str
    name: str
    arguments: Mapping[str, Any]
    text: str
    """The arguments as the caller wrote them: JSON."""


def parse_tool_calls(
    raw: object, where: str, unknown: Callable[[str, str], None], limit: JsonLimit
) -> tuple[ToolCall, ...]:
    """`tool_calls` of one message. A call without an id gets one. `unknown` is as in `parse_messages`.

    Raises `PromptError`.
    """
    if not isinstance(raw, list):
        _refuse(f"{where} must be a list.", where)
    return tuple(_parse_call(call, f"{where}[{index}]", unknown, limit) for index, call in enumerate(raw))


def _parse_call(raw: object, where: str, unknown: Callable[[str, str], None], limit: JsonLimit) -> ToolCall:
    if not isinstance(raw, Mapping):
        _refuse(f"{where} must be an object.", where)
    if raw.get("type") not in (None, "function"):
        _refuse(f"{where}.type: only function is served, not {shown(raw['type'])}.", f"{where}.type")
    function = raw.get("function")
    if not isinstance(function, Mapping):
        _refuse(f"{where}.function must be an object with name and arguments.", f"{where}.function")
    _report(raw, where, _CALL_FIELDS, unknown)
    _report(function, f"{where}.function", _FUNCTION_FIELDS, unknown)
    name = function.get("name")
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_CHARS:
        message = f"{where}.function.name must be a text of 1 to {MAX_NAME_CHARS} characters."
        _refuse(message, f"{where}.function.name")
    require_unicode(name, f"{where}.function.name")
    arguments, text = _parse_arguments(function.get("arguments"), f"{where}.function.arguments", limit)
    return ToolCall(parse_call_id(raw.get("id"), f"{where}.id") or where, name, arguments, text)


def parse_call_id(raw: object, where: str) -> str | None:
    """The id of a call, or None where there is none. Raises `PromptError`."""
    if raw is None or raw == "":
        return None
    if not isinstance(raw, str):
        _refuse(f"{where} must be a string.", where)
    require_unicode(raw, where)
    return raw


def _parse_arguments(raw: object, where: str, limit: JsonLimit) -> tuple[Mapping[str, Any], str]:
    """The arguments as an object and as text. Some clients send an object; an empty text stands for no arguments."""
    if isinstance(raw, Mapping):
        limit.check(raw, where)
        return raw, json.dumps(raw, ensure_ascii=False)
    if raw is None or raw == "":
        return {}, "{}"
    if not isinstance(raw, str):
        _refuse(f"{where} must be the text of a JSON object.", where)
    require_unicode(raw, where)
    try:
        arguments = json.loads(raw)
    except (ValueError, RecursionError):  # json's own errors are ValueErrors; so is an integer of 5,000 digits
        arguments = None
    if not isinstance(arguments, dict):
        _refuse(f'{where} must be the text of a JSON object, such as {{"city": "Rome"}}.', where)
    limit.check(arguments, where)
    return arguments, raw.strip()


def _report(raw: Mapping[str, object], where: str, known: frozenset[str], unknown: Callable[[str, str], None]) -> None:
    for key, value in raw.items():
        if key not in known and value is not None:
            unknown(where, key)


def _refuse(message: str, param: str) -> NoReturn:
    raise PromptError(message, param=param)
