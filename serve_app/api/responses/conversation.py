"""What a request's model is to read: the items before it, its own items, and the prompt that they become.

Promises that an item of another caller is never read, and that a conversation that is too long is refused or, where the
request says so, loses its oldest items. Knows no event.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from serve_app.api.errors import bad_request
from serve_app.api.http.endpoint import ITEM_BYTES, Call
from serve_app.api.openai.tools import chosen, function_tool, require_different_names
from serve_app.api.responses.fields import ConversationFields
from serve_app.api.responses.ids import response_of
from serve_app.api.responses.items import Item, read_items, references, text_of
from serve_app.api.responses.kept import KeptResponses
from serve_app.api.responses.messages import PREVIOUS, Messages
from serve_app.api.structured import format_grammar
from serve_app.api.template_variables import template_variables
from serve_app.api.unknown_fields import UnknownFields
from serve_app.chat.json_values import JsonLimit
from serve_app.chat.options import ChatOptions, Tool
from serve_app.chat.prompt_error import PromptError
from serve_app.chat.unicode import shown
from serve_app.core import FailureCode, ModelCard
from serve_app.generation.request import Prompt
from serve_app.generation.service import CompletionService

TEXT_FORMAT = "text.format"
"""The field that says what the text must match."""
MAX_CHARS = 8 * 2**20
"""Of the texts of a conversation. Each of its responses keeps all of them, also those that the model does not read."""
MAX_REFERENCED = 32
"""Responses whose items one request may refer to: each is a call to the store."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """The items that the model reads, oldest first."""

    instructions: str | None
    items: Sequence[Item]
    earlier: int
    """How many of the items come from the previous response, and not from the request. Negative where oldest items of
    the request were dropped: item i is number `i - earlier` of the request."""

    def without(self, dropped: int) -> Conversation:
        """The conversation without its oldest items."""
        return Conversation(self.instructions, self.items[dropped:], self.earlier - dropped)

    def cuts(self) -> list[int]:
        """How many of the oldest items may be dropped: whole turns, so that no output loses its call."""
        starts = [index for index, item in enumerate(self.items) if item.get("role") == "user"]
        return [index for index in starts if index > 0]


class ConversationReader:
    """Reads conversations of requests, for one model."""

    def __init__(self, service: CompletionService, kept: KeptResponses) -> None:
        self._service = service
        self._kept = kept

    async def read(
        self, call: Call, request: ConversationFields, response_id: str, unknown: UnknownFields
    ) -> Conversation:
        """The conversation with the previous response's items. Raises `RequestError`."""
        items: list[Item] = []
        if request.input is not None:
            items = await call.run(partial(read_items, request.input, response_id, unknown))
            items = await self._with_references(call, items)
        earlier: list[Item] = []
        if request.previous_response_id is not None:
            earlier = await self._kept.conversation(call, request.previous_response_id)
        size = sum(map(_size, earlier)) + sum(map(_size, items))
        if size > MAX_CHARS:
            message = f"The conversation has {size} characters; at most {MAX_CHARS} are served. Send a shorter one."
            raise bad_request(message, param="input", code="invalid_value")
        return Conversation(request.instructions, [*earlier, *items], len(earlier))

    async def prompt(
        self,
        call: Call,
        card: ModelCard,
        conversation: Conversation,
        options: ChatOptions,
        unknown: UnknownFields,
        *,
        truncates: bool,
    ) -> tuple[Prompt, Conversation]:
        """The conversation as a prompt, and the part of the conversation that it holds. Raises `PromptError`.

        Reasoning in the request's items that the template does not read goes to `unknown`. `truncates`: a conversation
        that does not fit loses its oldest turns, as few as possible.
        """
        try:
            return await self._render(call, card, conversation, options, unknown), conversation
        except PromptError as error:
            cuts = conversation.cuts()
            if not truncates or error.code != FailureCode.CONTEXT_LENGTH_EXCEEDED or not cuts:
                raise
        low, high = 0, len(cuts) - 1  # the fewest cuts that fit are between them, if any do
        while low < high:
            middle = (low + high) // 2
            try:
                await self._render(call, card, conversation.without(cuts[middle]), options, unknown)
                high = middle
            except PromptError as error:
                if error.code != FailureCode.CONTEXT_LENGTH_EXCEEDED:
                    raise
                low = middle + 1
        shorter = conversation.without(cuts[low])
        return await self._render(call, card, shorter, options, unknown), shorter

    def options(self, request: ConversationFields, unknown: UnknownFields) -> ChatOptions:
        """How the prompt is written, and what the answer may be. Raises `ApiError` and `PromptError`."""
        reasoning, text = request.reasoning, request.text
        fields = {
            "reasoning_effort": ("reasoning.effort", None if reasoning is None else reasoning.effort),
            "verbosity": ("text.verbosity", None if text is None else text.verbosity),
        }
        known = self._service.template_variables
        tools, choice = chosen(flat_tools(request.tools or (), unknown), request.tool_choice)
        return ChatOptions(
            template_variables(request.chat_template_kwargs, fields, known, unknown),
            tools=tools,
            tool_choice=choice,
            parallel_tool_calls=request.parallel_tool_calls is not False,
            text_grammar=format_grammar(text.format, TEXT_FORMAT, unknown) if text is not None and text.format else "",
        )

    async def _render(
        self, call: Call, card: ModelCard, conversation: Conversation, options: ChatOptions, unknown: UnknownFields
    ) -> Prompt:
        written = Messages(conversation.instructions, conversation.items, conversation.earlier)
        if not written.messages:
            raise bad_request("The input has nothing that the model could answer.", param="input", code="invalid_value")

        def note(where: str, field: str) -> None:  # reasoning that the template does not read
            place = written.place(where)
            if place != PREVIOUS:
                unknown.add_in(place, field)

        render = partial(self._service.render_chat, card, written.messages, options, note)
        # The items of earlier responses are not in the body, whose size decides where the work is done.
        earlier_bytes = sum(map(_size, conversation.items[: max(0, conversation.earlier)]))
        try:
            items = len(conversation.items) + len(options.tools) + earlier_bytes // ITEM_BYTES
            return await call.run(render, items=items)
        except PromptError as error:
            raise written.named(error) from error

    async def _with_references(self, call: Call, items: list[Item]) -> list[Item]:
        """The items, with those that are referred to in place of the references. Raises `RequestError`."""
        referred = dict(references(items))
        if not referred:
            return items
        responses = {item_id: response_of(item_id) for item_id in referred.values()}
        wanted = {response_id for response_id in responses.values() if response_id is not None}
        if len(wanted) > MAX_REFERENCED:
            message = f"The input refers to items of more than {MAX_REFERENCED} responses; send the items themselves."
            raise bad_request(message, param="input", code="invalid_value")
        found = await asyncio.gather(*(self._kept.items_or_none(call, response_id) for response_id in wanted))
        by_id = {item["id"]: item for of_response in found for item in of_response}
        for index, item_id in referred.items():
            if item_id not in by_id:
                message = f"Item with id '{item_id[:100]}' not found. Items are kept with responses that are kept."
                raise bad_request(message, param=f"input[{index}].id", code="item_not_found")
            items[index] = by_id[item_id]
        return items


def flat_tools(raw: Sequence[Mapping[str, Any]], unknown: UnknownFields) -> tuple[Tool, ...]:
    """`tools` as the Responses API has them: a function's fields stand beside its type.

    Raises `ApiError`, also for tools that OpenAI runs itself, and `PromptError`.
    """
    limit = JsonLimit()
    tools = []
    for index, tool in enumerate(raw):
        where = f"tools[{index}]"
        if tool.get("type") != "function":
            message = f"This server serves tools of the type function, not {shown(tool.get('type'))}."
            raise bad_request(message, param=f"{where}.type", code="unsupported_parameter")
        function = {name: value for name, value in tool.items() if name != "type"}
        tools.append(function_tool(function, where, unknown.add_in, limit))
    require_different_names(tools, "tools")
    return tuple(tools)


def _size(item: Item) -> int:
    if item["type"] == "function_call":
        return len(item["arguments"]) + len(item["name"]) + len(item["call_id"])
    if item["type"] == "compaction":
        return len(item["encrypted_content"])
    return len(text_of(item)) + sum(len(part["text"]) for part in item.get("summary", ()))
