"""Anthropic's `tools` and `tool_choice` as the options of a chat.

Promises that a tool which the service can't offer as it is described is refused by its name and place. Knows no
template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from serve_app.api.anthropic.fields import ToolChoiceFields
from serve_app.api.errors import bad_request
from serve_app.api.unknown_fields import UnknownFields, unsupported
from serve_app.chat.options import Tool, ToolChoice

_FIELDS = frozenset({"type", "name", "description", "input_schema", "strict"})
_NO_EFFECT = frozenset({"cache_control", "eager_input_streaming"})
"""Arguments are streamed as they are generated, for every tool."""
_OFF: tuple[object, ...] = (None, False, "", [], {})
_NEUTRAL: Mapping[str, object] = {"allowed_callers": ["direct"]}
_NOT_SERVED: Mapping[str, str] = {
    "defer_loading": "tools that are loaded later need Anthropic's tool search, which is not supported by this server.",
    "allowed_callers": "only calls by the model itself ('direct') are supported by this server.",
}
_MODES = {"auto": "auto", "any": "required", "tool": "named", "none": "none"}
_SHOWN_CHARS = 100


def parsed_tools(raw: Sequence[Any], unknown: UnknownFields) -> tuple[Tool, ...]:
    """The tools of a request. Raises `ApiError`."""
    tools = tuple(_parsed(tool, f"tools[{index}]", unknown) for index, tool in enumerate(raw))
    names: set[str] = set()
    for index, tool in enumerate(tools):
        if tool.name in names:
            message = f"tools[{index}].name: two tools have the name '{tool.name}'."
            raise bad_request(message, param=f"tools[{index}].name", code="invalid_value")
        names.add(tool.name)
    return tools


def _parsed(raw: Any, where: str, unknown: UnknownFields) -> Tool:
    if not isinstance(raw, Mapping):
        raise bad_request(f"{where} must be an object with name and input_schema.", param=where, code="invalid_type")
    if (kind := raw.get("type")) not in (None, "custom"):
        shown = str(kind)[:_SHOWN_CHARS]
        raise unsupported(where, f"Anthropic's own tool '{shown}' is not supported by this server; describe a tool.")
    for key, value in raw.items():
        if key in _FIELDS or key in _NO_EFFECT or value in _OFF or _NEUTRAL.get(key) == value:
            continue
        if key in _NOT_SERVED:
            raise unsupported(f"{where}.{key}", _NOT_SERVED[key])
        unknown.add_in(where, key)
    name, description = raw.get("name"), raw.get("description")
    if not isinstance(name, str) or not name:
        raise bad_request(f"{where}.name must be a name.", param=f"{where}.name", code="invalid_value")
    if description is not None and not isinstance(description, str):
        raise bad_request(f"{where}.description must be a string.", param=f"{where}.description", code="invalid_type")
    schema, strict = raw.get("input_schema"), raw.get("strict")
    if not isinstance(schema, Mapping):
        message = f"{where}.input_schema must be the JSON schema of an object."
        raise bad_request(message, param=f"{where}.input_schema", code="invalid_type")
    if strict is not None and not isinstance(strict, bool):
        raise bad_request(f"{where}.strict must be true or false.", param=f"{where}.strict", code="invalid_type")
    return Tool(name, description or "", schema, bool(strict))


def parsed_choice(raw: ToolChoiceFields | None, tools: Sequence[Tool]) -> tuple[ToolChoice, bool]:
    """What the model may do with the tools, and whether an answer may have several calls. Raises `ApiError`."""
    if raw is None:
        return ToolChoice(), True
    if raw.type in ("any", "tool") and not tools:
        raise bad_request("tool_choice needs tools.", param="tool_choice", code="invalid_value")
    if raw.type == "tool" and raw.name not in {tool.name for tool in tools}:
        message = f"tool_choice.name: none of the tools has the name '{str(raw.name)[:_SHOWN_CHARS]}'."
        raise bad_request(message, param="tool_choice.name", code="invalid_value")
    name = raw.name if raw.type == "tool" and raw.name else ""
    return ToolChoice(_MODES[raw.type], name), not raw.disable_parallel_tool_use  # type: ignore[arg-type]
