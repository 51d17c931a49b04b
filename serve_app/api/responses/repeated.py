"""What a response repeats of its request: the tools, the choice among them, and the format of the text.

Promises that only what is served is repeated, that a journal can hold it, and that it is short enough for the events
that repeat it. Knows no store.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

from serve_app.api.errors import ApiError, bad_request
from serve_app.api.http.sse import json_line
from serve_app.chat.options import ChatOptions

MAX_BYTES = 2**20
"""Of a response without its output, as JSON. Three of its events, and its journal, have all of it."""
_TOOL: Mapping[str, Any] = {"type": "function", "name": None, "description": None, "parameters": None, "strict": False}
"""The fields of a tool, with OpenAI's values for those that are left out."""
_FORMAT = {"type": str, "name": str, "description": str, "strict": bool, "schema": dict | str, "grammar": str}
"""The fields of a `text.format`, and those of its `json_schema`, with their types."""
_DESCRIPTION = frozenset({"name", "description", "strict", "schema"})
_READ: Mapping[str, frozenset[str]] = {
    "text": frozenset({"type"}),
    "json_object": frozenset({"type", "schema"}),
    "json_schema": frozenset({"type"}) | _DESCRIPTION,
    "grammar": frozenset({"type", "grammar"}),
}
"""The fields of a `text.format` that are read, by its type. Others are ignored, so nobody has looked at them."""


def repeated_tools(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`tools` that were read without an error. Raises `ApiError`."""
    made = []
    for index, tool in enumerate(tools):
        _require_short_numbers(tool.get("parameters"), f"tools[{index}].parameters")
        made.append(dict(_TOOL) | {name: tool[name] for name in _TOOL if tool.get(name) is not None})
    return made


def repeated_choice(raw: Any, options: ChatOptions) -> str | dict[str, Any]:
    """`tool_choice`, which was read as `options`."""
    if not raw or isinstance(raw, str):
        return raw or "auto"
    if raw["type"] == "function":
        return {"type": "function", "name": options.tool_choice.name}
    allowed = [{"type": "function", "name": tool.name} for tool in options.tools]
    return {"type": "allowed_tools", "mode": raw.get("allowed_tools", raw)["mode"], "tools": allowed}


def repeated_format(raw: Mapping[str, Any] | None, where: str) -> dict[str, Any]:
    """`text.format` that was read without an error. `where`: the field's name. Raises `ApiError`."""
    if not raw:
        return {"type": "text"}
    if raw["type"] == "json_schema" and "json_schema" in raw:  # as chats have it
        described = _known(raw["json_schema"], f"{where}.json_schema", _DESCRIPTION)
        return {"type": "json_schema", "json_schema": described}
    return _known(raw, where, _READ[raw["type"]])


def require_short(envelope: Mapping[str, Any]) -> None:
    """Raise `ApiError` for a response that is too long before it has any output."""
    size_bytes = len(json_line(envelope).encode())
    if size_bytes > MAX_BYTES:
        message = (
            f"A response repeats its instructions, tools and text.format. Here they take {size_bytes} bytes; at most "
            f"{MAX_BYTES} are served. Send long texts as input."
        )
        raise bad_request(message, code="invalid_value")


def _known(raw: Mapping[str, Any], where: str, names: Set[str]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, kind in _FORMAT.items():
        if name not in names or (value := raw.get(name)) is None:
            continue
        if not isinstance(value, kind):
            param = f"{where}.{name}"
            raise bad_request(f"Invalid type for '{param}'.", param=param, code="invalid_type")
        _require_short_numbers(value, f"{where}.{name}")
        made[name] = value
    return made


def _require_short_numbers(value: Any, param: str) -> None:
    """Raise `ApiError` for an integer that a journal can't hold. `value` is known to be shallow."""
    if isinstance(value, int):
        if not -(2**63) <= value < 2**64:
            raise _too_long(param)
    elif isinstance(value, Mapping):
        for item in value.values():
            _require_short_numbers(item, param)
    elif isinstance(value, list):
        for item in value:
            _require_short_numbers(item, param)


def _too_long(param: str) -> ApiError:
    message = f"{param} has an integer of more than 64 bits, which can't be kept. Write it as 1e30, for example."
    return bad_request(message, param=param, code="invalid_value")
