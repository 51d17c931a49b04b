"""Tools, calls and results written into ordinary messages, for chat templates that don't know them.

The form is that of Hermes and Qwen, which many models have seen: tools are listed in the system text, a call is JSON
between `<tool_call>` and `</tool_call>`, results come back in a user's turn. Promises turns that alternate where they
did. Knows no template.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from serve_app.chat.conversation import ChatMessage
from serve_app.chat.options import Tool
from serve_app.chat.template_style import TemplateStyle, template_tool
from serve_app.chat.tool_calls import ToolCall

CALL_START, CALL_END = "<tool_call>", "</tool_call>"
_RESULT_START, _RESULT_END = "<tool_response>", "</tool_response>"
_LIST_START, _LIST_END = "<tools>", "</tools>"
GENERIC_MARKERS = (_LIST_START, _LIST_END, CALL_START, CALL_END, _RESULT_START, _RESULT_END)
_INTRODUCTION = "You can call functions to help with the user's request. These are the functions, one on each line:"
_EXAMPLE = '{"name": "the function\'s name", "arguments": {"the argument\'s name": "its value"}}'
_HOW_TO_CALL = (
    "To call a function, answer with a JSON object with its name and its arguments, like this:\n"
    f"{CALL_START}\n{_EXAMPLE}\n{CALL_END}\n"
    f"The result comes back between {_RESULT_START} and {_RESULT_END}. If no function is needed, answer directly."
)


def written_out(
    messages: Sequence[ChatMessage], tools: Sequence[Tool], style: TemplateStyle
) -> tuple[list[ChatMessage], Sequence[Tool]]:
    """The messages and the tools to hand to a template of this style: what it does not show is in the messages' texts.

    With tools that the template does not show, calls and results are written out too, in the form that the model is
    told to use.
    """
    generic = bool(tools) and not style.shows_tools
    calls, results = generic or not style.shows_calls, generic or not style.shows_results
    written: list[ChatMessage] = []
    open_results = False
    for message in messages:
        if message.tool_calls and calls:
            texts = [message.content] if message.content else []
            message = replace(message, content="\n".join([*texts, *map(_call, message.tool_calls)]), tool_calls=())
        is_result = results and message.role == "tool"
        if is_result:
            message = ChatMessage("user", f"{_RESULT_START}\n{message.content}\n{_RESULT_END}")
        if open_results and message.role == "user":
            message = replace(message, content=f"{written.pop().content}\n{message.content}")
        open_results = is_result
        written.append(message)
    if not generic:
        return written, tools
    return _introduced(written, tools, style), ()


def _introduced(messages: list[ChatMessage], tools: Sequence[Tool], style: TemplateStyle) -> list[ChatMessage]:
    """The messages with the tools in a system text, or before the first message where there can be none."""
    lines = "\n".join(json.dumps(template_tool(tool), ensure_ascii=False) for tool in tools)
    text = f"{_INTRODUCTION}\n{_LIST_START}\n{lines}\n{_LIST_END}\n\n{_HOW_TO_CALL}"
    first, *rest = messages
    if first.role in ("system", "developer"):
        return [replace(first, content=f"{first.content}\n\n{text}" if first.content else text), *rest]
    if style.takes_system:
        return [ChatMessage("system", text), *messages]
    return [replace(first, content=f"{text}\n\n{first.content}"), *rest]


def _call(call: ToolCall) -> str:
    body = json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False)
    return f"{CALL_START}\n{body}\n{CALL_END}"
