"""What a chat template makes of tools, calls, results and reasoning: found by trying it out.

Templates disagree about the form of a call: arguments as an object or as text, the content beside it null or empty, ids
of nine characters only, one call to a message. Promises a form that the template shows, where there is one. Knows no
tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from serve_app.chat.conversation import ChatMessage
from serve_app.chat.options import Tool
from serve_app.chat.tool_calls import ToolCall

_TOOL, _CALLED, _KEY, _VALUE, _RESULT, _THOUGHT = (
    f"serve_app_probe_{word}" for word in ("tool", "called", "key", "value", "result", "thought")
)
PROBE_TEXT = re.compile(r"serve_app_probe_\w+")
"""What the texts of the probes look like in a rendered prompt."""
_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_SHORT_ID = 9


@dataclass(frozen=True, slots=True)
class TemplateStyle:
    """How messages are handed to a template, and what it shows of them."""

    parts: bool = False
    """Contents are lists of parts."""
    text_arguments: bool = False
    """Arguments of calls are JSON in a text, instead of objects."""
    null_content: bool = False
    """The content beside calls is null where it is empty, instead of an empty text."""
    short_ids: bool = False
    """Ids of calls have nine letters and digits (Mistral)."""
    one_call: bool = False
    """A message shows one call only (Llama 3.1, gpt-oss)."""
    shows_tools: bool = False
    shows_calls: bool = False
    shows_results: bool = False
    shows_reasoning: bool = False
    takes_system: bool = True


Show = Callable[[Sequence[ChatMessage], Sequence[Tool], TemplateStyle], str]
"""The text that a template makes of a trial, or "" when it refuses it."""

PROBE_TOOL = Tool(_TOOL, "A probe.", {"type": "object", "properties": {"a": {"type": "string", "description": "A."}}})


def probe_call(number: int = 0) -> ToolCall:
    """A call that shares no text with `PROBE_TOOL`, so that it can be found beside it."""
    arguments = {_KEY: f"{_VALUE}{number}"}
    return ToolCall(f"call_probe_{number}", _CALLED, arguments, json.dumps(arguments))


def probe_turns(calls: int = 1, reasoning: str = "", content: str = "") -> list[ChatMessage]:
    """A question, an answer with calls, and the results."""
    made = tuple(map(probe_call, range(calls)))
    answer = ChatMessage("assistant", content, reasoning=reasoning, tool_calls=made)
    results = [ChatMessage("tool", f"{_RESULT}{n}", _CALLED, tool_call_id=call.id) for n, call in enumerate(made)]
    return [ChatMessage("user", "Hi"), answer, *results]


def call_styles(style: TemplateStyle = TemplateStyle()) -> Iterator[TemplateStyle]:
    """The style with each form of calls, the usual one first."""
    for short, null, text in product((False, True), repeat=3):
        yield replace(style, short_ids=short, null_content=null, text_arguments=text)


def find_style(show: Show, *, parts: bool) -> TemplateStyle:
    """The style of the template that `show` runs. `parts`: it reads contents as lists of parts only."""
    plain = TemplateStyle(parts=parts)
    shows_tools = _TOOL in show([ChatMessage("user", "Hi")], [PROBE_TOOL], plain)
    tools = [PROBE_TOOL] if shows_tools else []
    style = replace(plain, shows_tools=shows_tools)
    best = 0
    for trial in call_styles(style):
        if (found := _how_well(show(probe_turns(), tools, trial))) > best:
            best = found
            style = replace(trial, shows_calls=True)
    if style.shows_calls:
        both = show(probe_turns(2), tools, style)
        style = replace(style, one_call=f"{_VALUE}1" not in both or f"{_VALUE}0" not in both)
    else:
        style = replace(style, short_ids=False)
    thoughtful = show(probe_turns(reasoning=_THOUGHT), tools, style)
    spoken = [ChatMessage("user", "Hi"), ChatMessage("assistant", "Hi", reasoning=_THOUGHT)]
    return replace(
        style,
        shows_results=f"{_RESULT}0" in show(probe_turns(), tools, style),
        shows_reasoning=_THOUGHT in thoughtful + show(spoken, [], style),
        takes_system=_VALUE in show([ChatMessage("system", _VALUE), ChatMessage("user", "Hi")], [], style),
    )


def _how_well(shown: str) -> int:
    """How well a call is shown: 0 not at all, 1 in a form that no model was trained on, 2 well."""
    if _CALLED not in shown or f"{_VALUE}0" not in shown or _KEY not in shown:
        return 0
    python_repr, twice_encoded = f"'{_KEY}'", f'\\"{_KEY}'
    return 1 if python_repr in shown or twice_encoded in shown else 2


def template_message(message: ChatMessage, style: TemplateStyle) -> Mapping[str, object]:
    """The message as a template reads it. A field that a message lacks is absent: templates ask whether it is there."""
    content: object = [{"type": "text", "text": message.content}] if style.parts else message.content
    if message.tool_calls and style.null_content and not message.content:
        content = None
    seen: dict[str, object] = {"role": message.role, "content": content}
    if message.name is not None:
        seen["name"] = message.name
    if message.reasoning:
        seen["reasoning_content"] = message.reasoning
    if message.tool_calls:
        seen["tool_calls"] = [_template_call(call, style) for call in message.tool_calls]
    if message.tool_call_id is not None:
        seen["tool_call_id"] = _template_id(message.tool_call_id, style)
    return seen


def _template_call(call: ToolCall, style: TemplateStyle) -> Mapping[str, object]:
    arguments: object = call.text if style.text_arguments else call.arguments
    function = {"name": call.name, "arguments": arguments}
    return {"id": _template_id(call.id, style), "type": "function", "function": function}


def _template_id(call_id: str, style: TemplateStyle) -> str:
    """The id, or nine letters and digits that stand for it."""
    if not style.short_ids or (len(call_id) == _SHORT_ID and call_id.isascii() and call_id.isalnum()):
        return call_id
    number = int.from_bytes(hashlib.sha256(call_id.encode()).digest()[:16])
    digits = []
    for _ in range(_SHORT_ID):
        number, digit = divmod(number, len(_ALPHABET))
        digits.append(_ALPHABET[digit])
    return "".join(digits)


def template_tool(tool: Tool) -> Mapping[str, Any]:
    """The tool as a template reads it. Templates rely on a description and on parameters."""
    parameters = {"type": "object", "properties": {}} if tool.parameters is None else tool.parameters
    function = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return {"type": "function", "function": function}
