"""POST /v1/messages and POST /v1/messages/count_tokens: Anthropic's messages.

Knows no replica: the service does the work.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from functools import partial
from typing import Any, TypeVar

from starlette.responses import Response

from serve_app.api.anthropic.conversation import Conversation, converted
from serve_app.api.anthropic.documents import message_document
from serve_app.api.anthropic.events import MessageWriter
from serve_app.api.anthropic.fields import CountFields, MessagesFields, PromptFields
from serve_app.api.anthropic.tools import parsed_choice, parsed_tools
from serve_app.api.fields import validate_open
from serve_app.api.http.endpoint import Call
from serve_app.api.structured import schema_grammar
from serve_app.api.template_variables import THINKING_SWITCHES
from serve_app.api.unknown_fields import UnknownFields
from serve_app.api.wire import ParsedRequest, WireFormat
from serve_app.chat.options import ChatOptions, TemplateValue
from serve_app.core import ModelCard, RequestError
from serve_app.generation.events import EventWriter
from serve_app.generation.request import Prompt, ResolvedRequest
from serve_app.generation.service import CompletionService

_EFFORT_VARIABLE = "reasoning_effort"
_EFFORTS = {"xhigh": "high", "max": "high"}
"""Efforts that no template knows -> the nearest that they know."""

_REFUSED_BY_TEMPLATE = "invalid_prompt"

Fields = TypeVar("Fields", bound=PromptFields)


class MessagesFormat(WireFormat):
    """The wire format of POST /v1/messages.

    The `settings` are `id` (the message's) and `omit_thinking` (thinking blocks come without their text).
    """

    name = "messages"

    def __init__(self, service: CompletionService, *, refuse_unknown_fields: bool) -> None:
        """Unknown fields are ignored, and named in the answer, unless they are to be refused."""
        self._service = service
        self._refuse_unknown_fields = refuse_unknown_fields

    async def parse(self, call: Call) -> ParsedRequest:
        """See `WireFormat`."""
        request, unknown = await self._read(MessagesFields, call)
        card = await self._service.ready_model(request.model, call.caller.models)
        prompt = await self._prompt(call, request, unknown, card)
        resolved = self._service.resolve(
            card, [prompt], request.params(), request_id=call.record.request_id, remaining_s=call.remaining_s()
        )
        omits = request.thinking is not None and request.thinking.display == "omitted"
        settings = {"id": f"msg_{uuid.uuid4().hex[:24]}", "omit_thinking": omits}
        whole = None if request.stream else partial(message_document, settings, resolved)
        return ParsedRequest(resolved, whole, settings, constraint_param=request.constraint_param)

    def writer(self, request: ResolvedRequest, settings: Mapping[str, Any]) -> EventWriter:
        """See `WireFormat`."""
        return MessageWriter(request, settings)

    async def handle_count(self, call: Call) -> Response:
        """The tokens of the prompt that a request would have, also where it is too long to be answered."""
        request, unknown = await self._read(CountFields, call)
        card = await self._service.ready_model(request.model, call.caller.models)
        prompt = await self._prompt(call, request, unknown, card, limited=False)
        call.record.prompt_tokens = len(prompt.ids)
        return Response(json.dumps({"input_tokens": len(prompt.ids)}), media_type="application/json")

    async def _read(self, model: type[Fields], call: Call) -> tuple[Fields, UnknownFields]:
        unknown = UnknownFields(call.record, refused=self._refuse_unknown_fields)
        request = await call.run(partial(validate_open, model, call.body or {}, unknown))
        request.check(unknown)
        return request, unknown

    async def _prompt(
        self, call: Call, request: PromptFields, unknown: UnknownFields, card: ModelCard, *, limited: bool = True
    ) -> Prompt:
        """Many templates refuse a system message behind another message. Its text is the user's then."""

        def rendered() -> Prompt:
            talk = converted(request.system, request.messages, unknown)
            options = self._options(request, talk, unknown)
            try:
                return self._rendered(card, talk, options, unknown, limited=limited)
            except RequestError as error:
                if not talk.has_inline_system or error.code != _REFUSED_BY_TEMPLATE:
                    raise
            talk = converted(request.system, request.messages, unknown, inline_system="user")
            return self._rendered(card, talk, options, unknown, limited=limited)

        return await call.run(rendered, items=len(request.messages) + _count(request.tools))

    def _rendered(
        self, card: ModelCard, talk: Conversation, options: ChatOptions, unknown: UnknownFields, *, limited: bool
    ) -> Prompt:
        def report(where: str, name: str) -> None:
            unknown.add_in(talk.place(where), name)

        try:
            return self._service.render_chat(card, talk.messages, options, report, limited=limited)
        except RequestError as error:
            raise talk.in_callers_terms(error) from None

    def _options(self, request: PromptFields, talk: Conversation, unknown: UnknownFields) -> ChatOptions:
        text = request.schema_of_text
        tools = parsed_tools(request.tools, unknown)
        choice, parallel = parsed_choice(request.tool_choice, tools)
        return ChatOptions(
            self._variables(request, unknown),
            add_generation_prompt=not talk.continues,
            continue_final_message=talk.continues,
            tools=tools,
            tool_choice=choice,
            parallel_tool_calls=parallel,
            text_grammar="" if text is None else schema_grammar(text.schema_, request.constraint_param),
        )

    def _variables(self, request: PromptFields, unknown: UnknownFields) -> dict[str, TemplateValue]:
        """The template's switches for thinking. What the template has no switch for is reported as ignored."""
        variables: dict[str, TemplateValue] = {}
        known = self._service.template_variables
        if request.thinking is not None and request.thinking.type in ("enabled", "disabled"):
            switches = THINKING_SWITCHES.intersection(known)
            variables.update(dict.fromkeys(switches, request.thinking.type == "enabled"))
            if not switches:
                unknown.add("thinking")
        effort = request.output_config and request.output_config.effort
        if effort and _EFFORT_VARIABLE in known:
            variables[_EFFORT_VARIABLE] = _EFFORTS.get(effort, effort)
        elif effort:
            unknown.add("output_config.effort")
        return variables


def _count(tools: Any) -> int:
    return len(tools) if isinstance(tools, list) else 0
