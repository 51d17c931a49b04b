"""POST /v1/responses: the body of a request, and the settings from which any ingress writes its response.

Knows no store and no stream.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from serve_app.api.http.endpoint import Call
from serve_app.api.priority import FLEX
from serve_app.api.responses.conversation import TEXT_FORMAT, ConversationReader
from serve_app.api.responses.fields import ResponseRequest, read_request
from serve_app.api.responses.ids import new_response_id
from serve_app.api.responses.repeated import repeated_choice, repeated_format, repeated_tools, require_short
from serve_app.api.responses.writer import ResponseWriter, error_event
from serve_app.api.unknown_fields import UnknownFields
from serve_app.api.wire import ParsedRequest, WireFormat
from serve_app.chat.options import ChatOptions
from serve_app.chat.token_texts import TokenTexts
from serve_app.core import Priority, RequestError
from serve_app.generation.completion import Usage
from serve_app.generation.request import ResolvedRequest
from serve_app.generation.service import CompletionService
from serve_app.generation.text import Delta


class ResponsesFormat(WireFormat):
    """The wire format of POST /v1/responses."""

    name = "responses"

    def __init__(
        self, service: CompletionService, reader: ConversationReader, *, refuse_unknown_fields: bool, keeps: bool
    ) -> None:
        """`keeps`: whether a response is kept whose request does not say."""
        self._service = service
        self._reader = reader
        self._refuse_unknown_fields = refuse_unknown_fields
        self._keeps = keeps
        self._tokens = TokenTexts(service.tokenizer)

    async def parse(self, call: Call) -> ParsedRequest:
        """See `WireFormat`. The `settings` are `response` (the document without what comes with the answer) and
        `input` (all items that the model reads)."""
        unknown = self.unknown(call)
        request = await call.run(partial(read_request, ResponseRequest, call.body or {}, unknown))
        params = request.params()
        card = await self._service.ready_model(request.model, call.caller.models)
        response_id = new_response_id()
        options = await call.run(partial(self._reader.options, request, unknown))
        conversation = await self._reader.read(call, request, response_id, unknown)
        prompt, conversation = await self._reader.prompt(
            call, card, conversation, options, unknown, truncates=request.truncation == "auto"
        )
        resolved = self._service.resolve(
            card, [prompt], params, request_id=call.record.request_id, remaining_s=call.remaining_s()
        )
        envelope = await call.run(partial(self._envelope, response_id, request, resolved, options))
        settings = {"response": envelope, "input": list(conversation.items)}
        whole = None if request.stream or request.background else partial(self._whole, settings)
        constraint_param = TEXT_FORMAT if options.text_grammar else "tools"
        return ParsedRequest(resolved, whole, settings, "max_output_tokens", constraint_param)

    def writer(self, request: ResolvedRequest, settings: Mapping[str, Any]) -> ResponseWriter:
        """See `WireFormat`."""
        return ResponseWriter(settings, self._tokens)

    def reader_error(
        self, error: RequestError, request: ResolvedRequest, settings: Mapping[str, Any], position: int
    ) -> bytes:
        """See `WireFormat`. The number is that of the last event before it: who reads on after it misses nothing."""
        return error_event(error, position - 1)

    def unknown(self, call: Call) -> UnknownFields:
        """What becomes of the unknown fields of a request."""
        return UnknownFields(call.record, refused=self._refuse_unknown_fields)

    def _whole(self, settings: Mapping[str, Any], gained: Sequence[Sequence[Delta]], usage: Usage) -> str:
        writer = ResponseWriter(settings, self._tokens)
        for delta in gained[0]:
            writer.add(delta, usage)
        return writer.document()

    def _envelope(
        self, response_id: str, request: ResponseRequest, resolved: ResolvedRequest, options: ChatOptions
    ) -> dict[str, Any]:
        """OpenAI's Response, in its order of fields. Those that are None here and depend on the answer come later.

        Raises `ApiError` for what can't be repeated.
        """
        sampling = resolved.requests[0].sampling
        text = request.text
        envelope = {
            "id": response_id,
            "object": "response",
            "created_at": int(time.time()),
            "status": None,
            "background": bool(request.background),
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "max_tool_calls": request.max_tool_calls,
            "model": resolved.model,
            "output": [],
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": request.previous_response_id,
            "prompt_cache_key": request.prompt_cache_key,
            "reasoning": {"effort": None if request.reasoning is None else request.reasoning.effort, "summary": None},
            "safety_identifier": request.safety_identifier,
            "service_tier": FLEX if resolved.priority is Priority.BATCH else "default",
            "store": self._keeps or bool(request.background) if request.store is None else request.store,
            "temperature": sampling.temperature,
            "text": {
                "format": repeated_format(None if text is None else text.format, TEXT_FORMAT),
                "verbosity": None if text is None else text.verbosity,
            },
            "tool_choice": repeated_choice(request.tool_choice, options),
            "tools": repeated_tools(request.tools or ()),
            "top_logprobs": request.top_logprobs or 0,
            "top_p": sampling.top_p,
            "truncation": request.truncation or "disabled",
            "usage": None,
            "user": request.user,
            "metadata": request.metadata or {},
        }
        require_short(envelope)
        return envelope
