"""Anthropic's messages as OpenAI-style messages, which `CompletionService.render_chat` takes.

    system             one message at the front; inline system messages stay where they are, or become the user's text
    text               more content of the turn: consecutive messages of a role are one turn
    tool_use           an entry of the assistant's `tool_calls`
    tool_result        a message of the role `tool`
    thinking           the assistant's `reasoning_content`

Promises that nothing is lost in silence: blocks of other types are refused, unknown fields are reported, and errors
name the place in the caller's own request. Knows no template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from serve_app.api.errors import ApiError, bad_request
from serve_app.api.unknown_fields import UnknownFields, unsupported
from serve_app.chat.conversation import OFF_VALUES
from serve_app.chat.unicode import shown
from serve_app.core import RequestError

_ROLES = ("user", "assistant", "system")
MAX_MESSAGES = MAX_BLOCKS = 10_000
"""In one request. 10,000 blocks take 20 ms before the template sees them."""
_DIRECT_CALLER = {"type": "direct"}
_BILLING = "x-anthropic-billing-header"
"""A system block of Claude Code that begins with this is for Anthropic's accounting. It differs in each request, so it
would keep every prompt behind it out of the cache."""
_ERROR_MARK = "Error: "
"""Put before a tool result with `is_error`: a template has no other place for it."""
_OPENAI_PLACE = re.compile(r"messages\[(\d+)\](?:\.\w+|\[\d+\])*")


@dataclass(slots=True)
class Conversation:
    """The messages so far, and where each of them begins in the caller's request."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    call_ids: set[str] = field(default_factory=set)
    thoughts: dict[int, list[str]] = field(default_factory=dict)
    """Index of an assistant's message -> its reasoning."""
    blocks: int = 0
    has_inline_system: bool = False
    """A system message stands behind another message."""

    @property
    def continues(self) -> bool:
        """The last message is one that the assistant has begun (a prefill)."""
        return bool(self.messages[-1]["role"] == "assistant")

    def turn(self, role: str, where: str) -> dict[str, Any]:
        """The turn of this role that is going on, or a new one."""
        if not self.messages or self.messages[-1]["role"] != role:
            self.add({"role": role, "content": ""}, where)
        return self.messages[-1]

    def add(self, message: dict[str, Any], where: str) -> None:
        """Begin a new turn."""
        self.messages.append(message)
        self.places.append(where)

    def add_text(self, role: str, text: str, where: str) -> None:
        """More text of this role."""
        turn = self.turn(role, where)
        turn["content"] = turn["content"] or []
        turn["content"].append({"type": "text", "text": text})

    def add_thinking(self, text: str, where: str) -> None:
        """More of the assistant's reasoning."""
        self.turn("assistant", where)
        self.thoughts.setdefault(len(self.messages) - 1, []).append(text)

    def close(self) -> None:
        """The request has no more messages."""
        for index, texts in self.thoughts.items():
            self.messages[index]["reasoning_content"] = "".join(texts)

    def count_blocks(self, blocks: int, where: str) -> None:
        """There are more blocks. Raises `ApiError` for too many."""
        self.blocks += blocks
        if self.blocks > MAX_BLOCKS:
            raise bad_request(
                f"{where}: a request may have at most {MAX_BLOCKS} content blocks.", param=where, code="invalid_value"
            )

    def place(self, converted: str) -> str:
        """`messages[3].content` of the converted messages, as the caller knows it; also inside a sentence."""

        def callers(match: re.Match[str]) -> str:
            index = int(match[1])
            return self.places[index] if index < len(self.places) else match[0]

        return _OPENAI_PLACE.sub(callers, converted)

    def in_callers_terms(self, error: RequestError) -> RequestError:
        """The same error, about the caller's own request."""
        param = None if error.param is None else self.place(error.param)
        return RequestError(self.place(error.message), code=error.code, param=param, retry_after_s=error.retry_after_s)


def converted(
    system: object, messages: Sequence[Mapping[str, Any]], unknown: UnknownFields, *, inline_system: str = "system"
) -> Conversation:
    """The conversation of a request. `inline_system`: the role that inline system messages get. Raises `ApiError`."""
    made = Conversation()
    if system not in (None, "", []):
        _add_system(made, system, "system", "system", unknown)
    if not 0 < len(messages) <= MAX_MESSAGES:
        expected = f"messages must have at least one message, and at most {MAX_MESSAGES}."
        raise bad_request(expected, param="messages", code="invalid_value")
    for index, message in enumerate(messages):
        _add_message(made, message, f"messages[{index}]", inline_system, unknown)
    if not made.messages:
        raise bad_request("messages has no text for the model.", param="messages", code="invalid_value")
    made.close()
    if made.continues:
        _check_prefill(made, unknown)
    return made


def _add_message(
    made: Conversation, message: Mapping[str, Any], where: str, inline_system: str, unknown: UnknownFields
) -> None:
    role, content, at = message.get("role"), message.get("content"), f"{where}.content"
    if role not in _ROLES:
        expected = f"{where}.role must be one of {', '.join(_ROLES)}; it is {shown(role)}."
        raise bad_request(expected, param=f"{where}.role", code="invalid_value")
    for key, value in message.items():
        if key not in ("role", "content") and value not in OFF_VALUES:
            unknown.add_in(where, key)
    if role == "system":
        inline = any(earlier["role"] != "system" for earlier in made.messages)
        made.has_inline_system |= inline
        _add_system(made, content, inline_system if inline else "system", at, unknown)
    elif isinstance(content, str):
        made.add_text(role, content, at)
    else:
        for block, place in _blocks(made, content, at):
            _add_block(made, role, block, place, unknown)


def _add_system(made: Conversation, content: object, role: str, where: str, unknown: UnknownFields) -> None:
    if isinstance(content, str):
        made.add_text(role, content, where)
        return
    for block, place in _blocks(made, content, where):
        if block["type"] != "text":
            raise _not_served(block["type"], place)
        if not (text := _text(block, place, unknown)).startswith(_BILLING):
            made.add_text(role, text, where)


def _blocks(made: Conversation, content: object, where: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Each block of a content with its place; every one has a `type`. Raises `ApiError`."""
    if not isinstance(content, list) or not content:
        raise bad_request(f"{where} must be a string or a list of content blocks.", param=where, code="invalid_type")
    made.count_blocks(len(content), where)
    for index, block in enumerate(content):
        place = f"{where}[{index}]"
        if not isinstance(block, Mapping) or not isinstance(block.get("type"), str):
            message = f'{place} must be a content block such as {{"type": "text", "text": "Hi"}}.'
            raise bad_request(message, param=place, code="invalid_type")
        yield block, place


def _add_block(made: Conversation, role: str, block: Mapping[str, Any], where: str, unknown: UnknownFields) -> None:
    match role, block["type"]:
        case _, "text":
            made.add_text(role, _text(block, where, unknown), where)
        case "assistant", "thinking":
            _report(block, ("thinking", "signature"), where, unknown)
            made.add_thinking(_string(block, "thinking", where), where)
        case "assistant", "redacted_thinking":
            made.turn(role, where)
            unknown.add_in(where, "redacted_thinking")
        case "assistant", "tool_use":
            _add_call(made, block, where, unknown)
        case "user", "tool_result":
            _add_result(made, block, where, unknown)
        case _, "thinking" | "redacted_thinking" | "tool_use" | "tool_result":
            other = "assistant" if role == "user" else "user"
            message = f"{where}: a block of the type '{block['type']}' belongs to a message of the role {other}."
            raise bad_request(message, param=where, code="invalid_value")
        case _, kind:
            raise _not_served(kind, where)


def _add_call(made: Conversation, block: Mapping[str, Any], where: str, unknown: UnknownFields) -> None:
    _report(block, ("id", "name", "input"), where, unknown)
    call_id, name = _string(block, "id", where), _string(block, "name", where)
    arguments = block.get("input")
    if not isinstance(arguments, dict):
        raise bad_request(f"{where}.input must be an object.", param=f"{where}.input", code="invalid_type")
    made.call_ids.add(call_id)
    function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
    turn = made.turn("assistant", where)
    turn.setdefault("tool_calls", []).append({"id": call_id, "type": "function", "function": function})


def _add_result(made: Conversation, block: Mapping[str, Any], where: str, unknown: UnknownFields) -> None:
    _report(block, ("tool_use_id", "content", "is_error"), where, unknown)
    call_id = _string(block, "tool_use_id", where)
    if call_id not in made.call_ids:
        message = f"{where}.tool_use_id: no tool_use block before it has the id {shown(call_id)}."
        raise bad_request(message, param=f"{where}.tool_use_id", code="invalid_value")
    content, at = block.get("content"), f"{where}.content"
    if isinstance(content, str) or not content:
        texts = [content or ""]
    else:
        texts = []
        for part, place in _blocks(made, content, at):
            if part["type"] != "text":
                raise _not_served(part["type"], place)
            texts.append(_text(part, place, unknown))
    if block.get("is_error") is True:
        texts[0] = _ERROR_MARK + texts[0]
    parts = [{"type": "text", "text": text} for text in texts]
    made.add({"role": "tool", "tool_call_id": call_id, "content": parts}, at)


def _check_prefill(made: Conversation, unknown: UnknownFields) -> None:
    """Only text can be continued. Raises `ApiError`."""
    last, where = made.messages[-1], made.places[-1]
    if "tool_calls" in last:
        message = "The last message calls tools: send their tool_result blocks in a message of the role user."
        raise bad_request(message, param=where, code="invalid_value")
    if last.pop("reasoning_content", None):
        unknown.add_in(where, "thinking")


def _text(block: Mapping[str, Any], where: str, unknown: UnknownFields) -> str:
    _report(block, ("text",), where, unknown)
    return _string(block, "text", where)


def _report(block: Mapping[str, Any], known: Sequence[str], where: str, unknown: UnknownFields) -> None:
    """Report the unknown fields of a block. `cache_control` may stand in every one."""
    for key, value in block.items():
        if key in known or key in ("type", "cache_control") or value in OFF_VALUES:
            continue
        if key != "caller" or value != _DIRECT_CALLER:
            unknown.add_in(where, key)


def _string(block: Mapping[str, Any], name: str, where: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise bad_request(f"{where}.{name} must be a string.", param=f"{where}.{name}", code="invalid_type")
    return value


def _not_served(kind: str, where: str) -> ApiError:
    return unsupported(where, f"content blocks of the type {shown(kind)} are not supported by this server.")
