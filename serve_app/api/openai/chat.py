"""POST /v1/chat/completions: OpenAI's chat schema.

Knows no replica: the service does the work.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from pydantic import Field

from serve_app.api.call_ids import call_id
from serve_app.api.errors import bad_request
from serve_app.api.fields import MaxTokens, Messages, OpenAIFields, validate_open
from serve_app.api.http.endpoint import Call
from serve_app.api.http.sse import json_text
from serve_app.api.openai.chunks import OpenAIFormat
from serve_app.api.openai.extras import finite
from serve_app.api.openai.tools import ToolFields
from serve_app.api.structured import StructuredFields, wanted
from serve_app.api.template_variables import template_variables
from serve_app.api.unknown_fields import UnknownFields
from serve_app.api.wire import ParsedRequest
from serve_app.chat.options import ChatOptions
from serve_app.chat.parts import ArgumentsPart, CallPart, Part, ReasoningPart, TextPart
from serve_app.generation.request import CompletionParams
from serve_app.generation.text import Delta


class TemplateFields(ToolFields):
    """The fields that decide how a chat is written, and how its answer is read."""

    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Any = None
    verbosity: Any = None
    enable_thinking: Any = None
    """Sets the chat template's variable of this name if there is one; so do `reasoning_effort` and `verbosity`."""
    include_reasoning: bool | None = None
    """vLLM's: false leaves the reasoning out of the answer."""
    separate_reasoning: bool | None = None
    """SGLang's: false makes the reasoning a part of the content."""
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class ChatRequest(TemplateFields, StructuredFields, OpenAIFields):
    """The body of POST /v1/chat/completions."""

    messages: Messages
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None
    """OpenAI's newer name for `max_tokens`."""
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)


class ChatFormat(OpenAIFormat):
    """The wire format of POST /v1/chat/completions."""

    name = "chat"
    whole_kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    id_prefix = "chatcmpl"
    prompts_in_choices = False

    async def parse(self, call: Call) -> ParsedRequest:
        """See `WireFormat`."""
        unknown = UnknownFields(call.record, refused=self._refuse_unknown_fields)
        request = await call.run(partial(validate_open, ChatRequest, call.body or {}, unknown))
        params = _params(request)
        card = await self._service.ready_model(request.model, call.caller.models)
        messages = request.messages
        options = await call.run(partial(chat_options, request, self._service.template_variables, unknown))
        text = await call.run(partial(wanted, request, unknown))
        options = replace(options, text_grammar=text.grammar)
        truncates = params.truncate_to is not None
        render = partial(self._service.render_chat, card, messages, options, unknown.add_in, truncates=truncates)
        prompt = await call.run(render, items=len(messages) + len(options.tools))
        params = await self._with_prediction(call, card, request, params)
        resolved = self._service.resolve(
            card, [prompt], params, request_id=call.record.request_id, remaining_s=call.remaining_s()
        )
        limit = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
        return self._parsed(resolved, request, limit, text.param if text.grammar else "tools")

    def content(self, answer_id: str, index: int, deltas: Sequence[Delta]) -> dict[str, Any]:
        """See `OpenAIFormat`."""
        return {"message": message(answer_id, index, (part for delta in deltas for part in delta.parts))}

    def opening(self, index: int, *, may_call: bool) -> str:
        """See `OpenAIFormat`. OpenAI's content is null where there may be calls and no text."""
        content = "null" if may_call else '""'
        delta = f'{{"role": "assistant", "content": {content}, "refusal": null}}'
        return f'{{"index": {index}, "delta": {delta}, "logprobs": null, "finish_reason": null}}'

    def empty_piece(self, choice: int) -> str:
        """See `OpenAIFormat`."""
        return f'{{"index": {choice}, "delta": {{}}, "logprobs": null, "finish_reason": null}}'

    def pieces(self, answer_id: str, delta: Delta) -> Iterable[str]:
        """See `OpenAIFormat`. Logprobs are in the first entry of their delta."""
        start = f'{{"index": {delta.choice}, "delta": '
        parts = delta.parts
        if delta.logprobs and not parts:
            parts = (TextPart(""),)
        logprobs = self._logprobs_json(delta) if delta.logprobs else "null"
        for part in parts:
            yield f'{start}{_piece(answer_id, delta.choice, part)}, "logprobs": {logprobs}, "finish_reason": null}}'
            logprobs = "null"
        if delta.finish_reason is not None:
            yield f'{start}{{}}, "logprobs": null, "finish_reason": "{delta.finish_reason}"}}'

    def logprobs(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        """See `OpenAIFormat`: OpenAI's ChoiceLogprobs."""
        content = [
            {
                **self._token(told.token_id, told.logprobs.logprob),
                "top_logprobs": [self._token(*other) for other in told.logprobs.top],
            }
            for delta in deltas
            for told in delta.logprobs or ()
        ]
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        content = self._tokens.utf8(token_id)
        return {
            "token": self._tokens.text(token_id),
            "logprob": finite(logprob),
            "bytes": None if content is None else list(content),
        }


def message(answer_id: str, choice: int, parts: Iterable[Part]) -> dict[str, Any]:
    """The assistant's message of a whole answer. Its content is null where it has tool calls and no text."""
    text: list[str] = []
    reasoning: list[str] = []
    calls: list[tuple[str, list[str]]] = []
    for part in parts:
        match part:
            case TextPart():
                text.append(part.text)
            case ReasoningPart():
                reasoning.append(part.text)
            case CallPart():
                calls.append((part.name, []))
            case ArgumentsPart():
                calls[part.number][1].append(part.text)
    content = "".join(text) if text or not calls else None
    made: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None, "annotations": []}
    if reasoning:
        made["reasoning_content"] = made["reasoning"] = "".join(reasoning)
    if calls:
        made["tool_calls"] = [
            {
                "id": call_id(answer_id, choice, number),
                "type": "function",
                "function": {"name": name, "arguments": "".join(arguments)},
            }
            for number, (name, arguments) in enumerate(calls)
        ]
    return made


def _piece(answer_id: str, choice: int, part: Part) -> str:
    """The JSON of the `delta` that tells a part."""
    match part:
        case TextPart():
            return f'{{"content": {json_text(part.text)}}}'
        case ReasoningPart():
            text = json_text(part.text)
            return f'{{"reasoning_content": {text}, "reasoning": {text}}}'
        case CallPart():
            function = f'{{"name": {json_text(part.name)}, "arguments": ""}}'
            of_call = f'"id": "{call_id(answer_id, choice, part.number)}", "type": "function", "function": {function}'
        case ArgumentsPart():
            of_call = f'"function": {{"arguments": {json_text(part.text)}}}'
    return f'{{"tool_calls": [{{"index": {part.number}, {of_call}}}]}}'


def _params(request: ChatRequest) -> CompletionParams:
    max_tokens = request.max_tokens
    if request.max_completion_tokens is not None:
        if max_tokens not in (None, request.max_completion_tokens):
            raise bad_request("Give max_tokens or max_completion_tokens, not both.", param="max_tokens")
        max_tokens = request.max_completion_tokens
    if request.top_logprobs and not request.logprobs:
        raise bad_request("top_logprobs needs logprobs to be true.", param="top_logprobs", code="invalid_value")
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    return request.params(max_tokens=max_tokens, logprobs=logprobs)


def chat_options(request: TemplateFields, known: Collection[str], unknown: UnknownFields) -> ChatOptions:
    """How the request's prompt is written. Raises `ApiError`.

    `chat_template_kwargs` take precedence over the fields that set a variable. `known`: the variables that the template
    leaves to its callers. Any other variable goes to `unknown`.
    """
    if request.add_generation_prompt and request.continue_final_message:
        message = "add_generation_prompt begins a new answer, so it can't be combined with continue_final_message."
        raise bad_request(message, param="continue_final_message", code="invalid_value")
    fields = {name: (name, getattr(request, name)) for name in ("reasoning_effort", "verbosity", "enable_thinking")}
    variables = template_variables(request.chat_template_kwargs, fields, known, unknown)
    continues = bool(request.continue_final_message)
    begins = not continues if request.add_generation_prompt is None else request.add_generation_prompt
    tools, choice = request.read_tools(unknown.add_in)
    parallel = request.parallel_tool_calls is not False
    return ChatOptions(
        variables,
        begins,
        continues,
        tools,
        choice,
        parallel,
        split_reasoning=request.separate_reasoning is not False,
        show_reasoning=request.include_reasoning is not False,
    )
