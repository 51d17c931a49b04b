"""Every text of a message and of a tool: to look at all of them, or to change all of them.

Promises that no text is left out, however deep: names, ids, property names, enums, arguments. Knows no template.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from serve_app.chat.conversation import ChatMessage
from serve_app.chat.json_values import texts_in, with_texts
from serve_app.chat.options import ChatOptions, Tool
from serve_app.chat.tool_calls import ToolCall

Change = Callable[[str], str]


def message_texts(message: ChatMessage) -> Iterator[str]:
    """The texts of a message, empty ones included."""
    yield message.content
    yield message.reasoning
    yield message.name or ""
    yield message.tool_call_id or ""
    for call in message.tool_calls:
        yield call.id
        yield call.name
        yield call.text
        yield from texts_in(call.arguments)


def with_message_texts(message: ChatMessage, change: Change, content: Change | None = None) -> ChatMessage:
    """The message with all its texts changed. `content`: what to do with its content instead."""
    return replace(
        message,
        content=(content or change)(message.content),
        reasoning=change(message.reasoning),
        name=None if message.name is None else change(message.name),
        tool_call_id=None if message.tool_call_id is None else change(message.tool_call_id),
        tool_calls=tuple(_with_call_texts(call, change) for call in message.tool_calls),
    )


def _with_call_texts(call: ToolCall, change: Change) -> ToolCall:
    return ToolCall(change(call.id), change(call.name), with_texts(call.arguments, change), change(call.text))


def tool_texts(tool: Tool) -> Iterator[str]:
    """The texts of a tool."""
    yield tool.name
    yield tool.description
    yield from texts_in(tool.parameters)


def with_tool_texts(tool: Tool, change: Change) -> Tool:
    """The tool with all its texts changed."""
    parameters = with_texts(tool.parameters, change)
    return replace(tool, name=change(tool.name), description=change(tool.description), parameters=parameters)


def chat_texts(messages: Iterable[ChatMessage], options: ChatOptions) -> Iterator[str]:
    """The texts of a chat."""
    for message in messages:
        yield from message_texts(message)
    for tool in options.tools:
        yield from tool_texts(tool)
    yield from (value for value in options.variables.values() if isinstance(value, str))


def uses_tools(messages: Iterable[ChatMessage], options: ChatOptions) -> bool:
    """Whether a chat has tools, calls or results."""
    return bool(options.tools) or any(message.role == "tool" or message.tool_calls for message in messages)
