"""POST /v1/chat/completions: OpenAI's chat schema, streamed or whole.

Promises that both ways give the same text. Knows no replica: the service does the work.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from pydantic import Field
from starlette.responses import Response

from serve_app.api.errors import bad_request
from serve_app.api.events import WireFormat
from serve_app.api.fields import CompletionParams, MaxTokens, Messages, OpenAIFields, validate_open
from serve_app.api.http.endpoint import Call
from serve_app.api.http.sse import EventStream, json_text, one_line
from serve_app.api.openai.answer import Answerer, ChoiceSchema, ChunkEvents, finite
from serve_app.api.openai.chat_options import chat_options
from serve_app.api.unknown_fields import UnknownFields
from serve_app.chat.options import ChatOptions
from serve_app.chat.token_texts import TokenTexts
from serve_app.chat.tokenizer import ChatTokenizer
from serve_app.generation.service import Plan
from serve_app.generation.text import Delta


class ChatRequest(OpenAIFields):
    """The body."""

    messages: Messages
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None
    """The newer name of the same."""
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Any = None
    verbosity: Any = None
    enable_thinking: Any = None
    """These three set a variable of the same name where the model's chat template has one."""
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class ChatCompletions:
    """The handler."""

    def __init__(self, answerer: Answerer) -> None:
        self._answerer = answerer
        self._service = answerer.service

    async def handle(self, call: Call) -> Response | EventStream:
        """Raises `ApiError`."""
        if (continued := await self._answerer.resume.continued(call)) is not None:
            return continued
        unknown = self._answerer.unknown_fields(call)
        request = await call.run(partial(validate_open, ChatRequest, call.body or {}, unknown))
        params = _params(request)
        card = await self._service.ready_model(request.model)
        messages = request.messages
        options = await call.run(partial(_options, request, self._service.template_variables, unknown))
        render = partial(self._service.render_chat, card, messages, options, unknown.add_in)
        prompt = await call.run(render, items=len(messages))
        plan = self._service.plan(card, [prompt], params, call.record, call.remaining_s())
        return await self._answerer.answer(call, plan, request, _schema(self._service.tokenizer), CHAT)


def _params(request: ChatRequest) -> CompletionParams:
    max_tokens, param = request.max_tokens, "max_tokens"
    if request.max_completion_tokens is not None:
        if max_tokens not in (None, request.max_completion_tokens):
            raise bad_request("Give max_tokens or max_completion_tokens, not both.", param="max_tokens")
        max_tokens, param = request.max_completion_tokens, "max_completion_tokens"
    if request.top_logprobs and not request.logprobs:
        raise bad_request("top_logprobs needs logprobs to be true.", param="top_logprobs", code="invalid_value")
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    return request.params(max_tokens=max_tokens, max_tokens_param=param, logprobs=logprobs)


def _options(request: ChatRequest, known: frozenset[str], unknown: UnknownFields) -> ChatOptions:
    return chat_options(
        request.chat_template_kwargs or {},
        {name: getattr(request, name) for name in ("reasoning_effort", "verbosity", "enable_thinking")},
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=bool(request.continue_final_message),
        known=known,
        unknown=unknown,
    )


class _ChatSchema(ChoiceSchema):
    whole_kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def __init__(self, tokens: TokenTexts) -> None:
        self._tokens = tokens

    def whole(self, index: int, deltas: Sequence[Delta]) -> dict[str, Any]:
        text = "".join(text for delta in deltas for text in delta.texts)
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None, "annotations": []},
            "logprobs": self._logprobs(deltas),
            "finish_reason": deltas[-1].finish_reason,
        }

    def opening(self, index: int) -> str:
        delta = '{"role": "assistant", "content": "", "refusal": null}'
        return f'{{"index": {index}, "delta": {delta}, "logprobs": null, "finish_reason": null}}'

    def pieces(self, delta: Delta) -> Iterable[str]:
        start = f'{{"index": {delta.choice}, "delta": '
        text = "".join(delta.texts)
        if delta.logprobs:
            logprobs = one_line(json.dumps(self._logprobs([delta]), ensure_ascii=False))
            yield f'{start}{{"content": {json_text(text)}}}, "logprobs": {logprobs}, "finish_reason": null}}'
        elif text:
            yield f'{start}{{"content": {json_text(text)}}}, "logprobs": null, "finish_reason": null}}'
        if delta.finish_reason is not None:
            yield f'{start}{{}}, "logprobs": null, "finish_reason": "{delta.finish_reason}"}}'

    def _logprobs(self, deltas: Sequence[Delta]) -> dict[str, Any] | None:
        """OpenAI's ChoiceLogprobs, or None when none were asked for."""
        if all(delta.logprobs is None for delta in deltas):
            return None
        content = [
            {
                **self._entry(told.token_id, told.logprobs.logprob),
                "top_logprobs": [self._entry(*other) for other in told.logprobs.top],
            }
            for delta in deltas
            for told in delta.logprobs or ()
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        content = self._tokens.utf8(token_id)
        return {
            "token": self._tokens.text(token_id),
            "logprob": finite(logprob),
            "bytes": None if content is None else list(content),
        }


def _schema(tokenizer: ChatTokenizer) -> ChoiceSchema:
    return _ChatSchema(TokenTexts(tokenizer))


def _writer(plan: Plan, fields: Mapping[str, Any], tokenizer: ChatTokenizer) -> ChunkEvents:
    return ChunkEvents(_schema(tokenizer), plan, fields)


CHAT = WireFormat("chat", _writer, ChunkEvents.failed)
