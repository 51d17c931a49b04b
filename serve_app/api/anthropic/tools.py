"""Anthropic's `tools` and `tool_choice` as the options of a chat.

Promises that a tool which the service can't offer as it is described is refused by its place. Knows no template.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from serve_app.api.anthropic.fields import ToolChoiceFields
from serve_app.api.errors import bad_request
from serve_app.api.openai.tools import MAX_TOOLS, chosen, function_tool, require_different_names
from serve_app.api.unknown_fields import UnknownFields, unsupported
from serve_app.chat.conversation import OFF_VALUES
from serve_app.chat.json_values import JsonLimit
from serve_app.chat.options import Tool, ToolChoice
from serve_app.chat.unicode import shown

_FUNCTION = ("name", "description", "strict")
"""Fields that OpenAI's tools have too."""
_NO_EFFECT = frozenset({"type", "cache_control", "eager_input_streaming"})
"""Arguments are streamed as they are generated, for every tool."""
_NEUTRAL: Mapping[str, object] = {"allowed_callers": ["direct"]}
_NOT_SERVED: Mapping[str, str] = {
    "defer_loading": "tools that are loaded later need Anthropic's tool search, which is not supported by this server.",
    "allowed_callers": "only calls by the model itself ('direct') are supported by this server.",
}
_MODES = {"auto": "auto", "any": "required", "none": "none"}


def parsed_tools(raw: Any, unknown: UnknownFields) -> tuple[Tool, ...]:
    """The tools of a request. Raises `RequestError`."""
    if raw in (None, []):
        return ()
    if not isinstance(raw, list):
        raise bad_request("tools must be a list.", param="tools", code="invalid_type")
    if len(raw) > MAX_TOOLS:
        raise bad_request(f"At most {MAX_TOOLS} tools are taken.", param="tools", code="invalid_value")
    limit = JsonLimit()
    tools = tuple(_parsed(tool, f"tools[{index}]", unknown, limit) for index, tool in enumerate(raw))
    require_different_names(tools, "tools")
    return tools


def _parsed(raw: Any, where: str, unknown: UnknownFields, limit: JsonLimit) -> Tool:
    if not isinstance(raw, Mapping):
        raise bad_request(f"{where} must be an object with name and input_schema.", param=where, code="invalid_type")
    if raw.get("type") not in (None, "custom"):
        message = f"Anthropic's own tool {shown(raw['type'])} is not supported by this server; describe a tool."
        raise unsupported(where, message)
    schema, at = raw.get("input_schema"), f"{where}.input_schema"
    if not isinstance(schema, Mapping):
        raise bad_request(f"{at} must be the JSON schema of an object.", param=at, code="invalid_type")
    limit.check(schema, at)
    for key, value in raw.items():
        if key in _FUNCTION or key == "input_schema" or key in _NO_EFFECT or value in OFF_VALUES:
            continue
        if key in _NOT_SERVED and value != _NEUTRAL.get(key):
            raise unsupported(f"{where}.{key}", _NOT_SERVED[key])
        if key not in _NOT_SERVED:
            unknown.add_in(where, key)
    function = {name: raw.get(name) for name in _FUNCTION}
    tool = function_tool(function, where, unknown.add_in, limit)
    return Tool(tool.name, tool.description, schema, tool.strict)


def parsed_choice(raw: ToolChoiceFields | None, tools: tuple[Tool, ...]) -> tuple[ToolChoice, bool]:
    """What the model may do with the tools, and whether an answer may have several calls. Raises `ApiError`."""
    if raw is None:
        return ToolChoice(), True
    wanted: Any = _MODES.get(raw.type) or {"type": "function", "function": {"name": raw.name}}
    _, choice = chosen(tools, wanted)
    return choice, not raw.disable_parallel_tool_use
