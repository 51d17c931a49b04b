"""OpenAI's `tools`, `tool_choice` and `parallel_tool_calls`, as `/v1/chat/completions` has them.

Other formats that describe tools convert theirs with `function_tool`. Promises tools whose names differ and whose
schemas are small enough to walk. Knows no template.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, Literal

from pydantic import SkipValidation

from serve_app.api.described import ChosenFunction, FunctionTool
from serve_app.api.errors import ApiError, bad_request
from serve_app.api.fields import OpenModel
from serve_app.api.unknown_fields import unsupported
from serve_app.chat.json_values import JsonLimit
from serve_app.chat.options import Tool, ToolChoice
from serve_app.chat.unicode import require_unicode, shown

MAX_TOOLS = 512
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
"""OpenAI's names and those of the Model Context Protocol, which may be longer and have dots."""
_TOOL_FIELDS = frozenset({"type", "function"})
_FUNCTION_FIELDS = frozenset({"name", "description", "parameters", "strict"})
_MODES: Mapping[str, ToolChoice] = {
    "auto": ToolChoice("auto"),
    "none": ToolChoice("none"),
    "required": ToolChoice("required"),
}

Unknown = Callable[[str, str], None]
"""Called for each unknown field, with its place and its name."""


class ToolFields(OpenModel):
    """The fields of a chat about tools."""

    tools: SkipValidation[list[FunctionTool] | None] = None
    tool_choice: SkipValidation[Literal["auto", "none", "required"] | ChosenFunction | None] = None
    parallel_tool_calls: bool | None = None

    def read_tools(self, unknown: Unknown) -> tuple[tuple[Tool, ...], ToolChoice]:
        """The tools and the choice among them. Raises `ApiError` and `PromptError`."""
        return chosen(read_tools(self.tools, unknown), self.tool_choice)


def read_tools(raw: Any, unknown: Unknown) -> tuple[Tool, ...]:
    """`tools`: a list of `{"type": "function", "function": {...}}`; null and what is empty are none.

    Raises `ApiError` and `PromptError`.
    """
    if not raw:
        return ()
    if not isinstance(raw, list):
        raise _wrong_type("tools", "A list is expected.")
    if len(raw) > MAX_TOOLS:
        raise _wrong_value("tools", f"At most {MAX_TOOLS} tools are taken.")
    limit = JsonLimit()
    tools = tuple(_tool(tool, f"tools[{index}]", unknown, limit) for index, tool in enumerate(raw))
    require_different_names(tools, "tools")
    return tools


def _tool(raw: Any, where: str, unknown: Unknown, limit: JsonLimit) -> Tool:
    if not isinstance(raw, Mapping):
        raise _wrong_type(where, "An object is expected.")
    if raw.get("type") != "function":
        message = f"This server serves tools of the type function, not {shown(raw.get('type'))}."
        raise bad_request(message, param=f"{where}.type", code="unsupported_parameter")
    for field in raw:
        if field not in _TOOL_FIELDS and raw[field] is not None:
            unknown(where, field)
    return function_tool(raw.get("function"), f"{where}.function", unknown, limit)


def function_tool(raw: Any, where: str, unknown: Unknown, limit: JsonLimit) -> Tool:
    """A tool from an object with `name`, `description`, `parameters` and `strict`, which stands at `where`.

    `limit` is that of all tools of the request. Raises `ApiError` and `PromptError`.
    """
    if not isinstance(raw, Mapping):
        raise _wrong_type(where, "An object is expected.")
    for field in raw:
        if field not in _FUNCTION_FIELDS and raw[field] is not None:
            unknown(where, field)
    name = tool_name(raw.get("name"), f"{where}.name")
    description, parameters, strict = raw.get("description"), raw.get("parameters"), raw.get("strict")
    if not isinstance(description, str | None):
        raise _wrong_type(f"{where}.description", "A string is expected.")
    require_unicode(description or "", f"{where}.description")
    if not isinstance(parameters, Mapping | None):
        raise _wrong_type(f"{where}.parameters", "A JSON schema, which is an object, is expected.")
    limit.check(parameters, f"{where}.parameters")
    if not isinstance(strict, bool | None):
        raise _wrong_type(f"{where}.strict", "A boolean is expected.")
    return Tool(name, description or "", parameters, bool(strict))


def tool_name(name: Any, param: str) -> str:
    """The name. Raises `ApiError` unless a tool can have it."""
    if not isinstance(name, str):
        raise _wrong_type(param, "A string is expected.")
    if _NAME.fullmatch(name) is None:
        raise _wrong_value(param, "1 to 128 letters, digits, underscores, hyphens or dots are expected.")
    return name


def require_different_names(tools: Sequence[Tool], param: str) -> None:
    """Raise `ApiError` when two tools have one name."""
    names: set[str] = set()
    for tool in tools:
        if tool.name in names:
            raise _wrong_value(param, f"Two tools have the name '{tool.name}'.")
        names.add(tool.name)


def chosen(tools: tuple[Tool, ...], raw: Any, param: str = "tool_choice") -> tuple[tuple[Tool, ...], ToolChoice]:
    """The tools that `tool_choice` allows, and the choice among them.

    The choice is a mode, one function, or `allowed_tools`, which leaves the others out. Raises `ApiError`.
    """
    if not raw:
        return tools, ToolChoice()
    if isinstance(raw, str):
        if raw not in _MODES:
            raise _wrong_value(param, f"auto, none, required or an object is expected, not {shown(raw)}.")
        choice = _MODES[raw]
    elif not isinstance(raw, Mapping):
        raise _wrong_type(param, "A string or an object is expected.")
    elif raw.get("type") == "allowed_tools":
        tools, choice = _allowed(tools, raw.get("allowed_tools", raw), param)
    elif raw.get("type") == "function":
        choice = ToolChoice("named", _named(raw, {tool.name for tool in tools}, param))
    else:
        raise unsupported(param, f"A choice of the type {shown(raw.get('type'))} is not supported by this server.")
    if choice.mode in ("required", "named") and not tools:
        raise _wrong_value(param, "It needs tools.")
    return tools, choice


def _allowed(tools: tuple[Tool, ...], raw: Any, param: str) -> tuple[tuple[Tool, ...], ToolChoice]:
    if not isinstance(raw, Mapping) or not isinstance(raw.get("tools"), list):
        raise _wrong_type(f"{param}.allowed_tools", "An object with mode and tools is expected.")
    if raw.get("mode") not in ("auto", "required"):
        raise _wrong_value(f"{param}.allowed_tools.mode", "auto or required is expected.")
    where = f"{param}.allowed_tools.tools"
    known = {tool.name for tool in tools}
    names = {_named(tool, known, f"{where}[{index}]") for index, tool in enumerate(raw["tools"])}
    return tuple(tool for tool in tools if tool.name in names), _MODES[raw["mode"]]


def _named(raw: Any, known: Set[str], param: str) -> str:
    """The name in `{"type": "function", "function": {"name": ...}}`, or in the same without the inner object."""
    function = raw.get("function", raw) if isinstance(raw, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise _wrong_type(param, 'An object such as {"type": "function", "function": {"name": "f"}} is expected.')
    if name not in known:
        raise _wrong_value(param, f"There is no tool {shown(name)} in tools.")
    return name


def _wrong_type(param: str, what: str) -> ApiError:
    return bad_request(f"Invalid type for '{param}': {what}", param=param, code="invalid_type")


def _wrong_value(param: str, what: str) -> ApiError:
    return bad_request(f"Invalid value for '{param}': {what}", param=param, code="invalid_value")
