"""POST /stream and GET /stream: a prompt document in, one server-sent event a token out.

Promises the documents of docs/api.md. Knows no replica: the service does the work.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

from starlette.datastructures import QueryParams

from serve_app.api.errors import api_error, bad_request
from serve_app.api.fields import NO_LIMIT, MaxTokens, Messages, SamplingFields, validate
from serve_app.api.headers import RESUME_QUERY
from serve_app.api.http.endpoint import Call
from serve_app.api.http.sse import json_text
from serve_app.api.wire import ParsedRequest, WireFormat, usage_document
from serve_app.core import FinishReason, RequestError
from serve_app.generation.completion import Usage
from serve_app.generation.events import EventWriter
from serve_app.generation.request import CompletionParams, ResolvedRequest
from serve_app.generation.service import CompletionService
from serve_app.generation.text import Delta

DEFAULT_MAX_TOKENS = 256


class PromptDocument(SamplingFields):
    """The body of POST /stream, with exactly one of `prompt` and `messages`."""

    prompt: str | None = None
    """Text to be continued."""
    messages: Messages | None = None
    """A chat: a list of {role, content}. The server renders it as the model's prompt."""
    max_tokens: MaxTokens | None = None
    """Default 256. It is cut to what is left of the context."""
    parse_special: bool = False
    """Whether control tokens in `prompt` are read as such; else they are text."""


class QueryDocument(SamplingFields):
    """The query of GET /stream: the fields of `PromptDocument` except `messages`."""

    prompt: str
    max_tokens: MaxTokens | None = None
    parse_special: bool = False


class NativeFormat(WireFormat):
    """The wire format of POST /stream, and of GET /stream without a body."""

    name = "stream"

    def __init__(self, service: CompletionService) -> None:
        self._service = service

    async def parse(self, call: Call) -> ParsedRequest:
        """See `WireFormat`."""
        document = await call.run(partial(self.document, call))
        card = await self._service.ready_model(None, call.caller.models)
        if document.messages is not None:
            messages = document.messages
            prompt = await call.run(partial(self._service.render_chat, card, messages), items=len(messages))
        else:
            text, special = document.prompt or "", document.parse_special
            prompt = await call.run(partial(self._service.render_text, card, text, parse_special=special))
        resolved = self._service.resolve(
            card, [prompt], _params(document), request_id=call.record.request_id, remaining_s=call.remaining_s()
        )
        return ParsedRequest(resolved, whole=None)

    def writer(self, request: ResolvedRequest, settings: Mapping[str, Any]) -> EventWriter:
        """See `WireFormat`."""
        return NativeWriter(request.seed)

    def document(self, call: Call) -> PromptDocument:
        """The document in a call's body or query. Raises `ApiError`."""
        if call.body is None:
            query = validate(QueryDocument, _query_fields(call.query), from_text=True)
            return PromptDocument.model_construct(**dict(query), messages=None)
        return read_document(call.body)


def _params(document: PromptDocument) -> CompletionParams:
    if document.max_tokens == NO_LIMIT:
        return CompletionParams(**document.sampling())
    return CompletionParams(
        **document.sampling(), max_tokens=document.max_tokens, default_max_tokens=DEFAULT_MAX_TOKENS
    )


def read_document(body: Mapping[str, Any]) -> PromptDocument:
    """A body as a `PromptDocument`. Raises `ApiError`."""
    document = validate(PromptDocument, body)
    if (document.prompt is None) == (document.messages is None):
        raise bad_request("Give either prompt or messages.", param="prompt", code="invalid_value")
    if document.parse_special and document.messages is not None:
        message = "parse_special goes with a prompt; control tokens in messages are always text."
        raise bad_request(message, param="parse_special", code="invalid_value")
    return document


def _query_fields(query: QueryParams) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name in query:
        if name == RESUME_QUERY:
            continue
        values = query.getlist(name)
        if name == "stop":
            fields[name] = values
        elif len(values) > 1:
            raise bad_request(f"The parameter '{name[:100]}' is given more than once.", param=name[:100])
        else:
            fields[name] = values[0]
    return fields


class NativeWriter(EventWriter):
    """One event a token, then `done`."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._last_token_id = 0
        self._finish_reason: FinishReason | None = None

    def opened(self) -> list[bytes]:
        """Nothing."""
        return []

    def gained(self, delta: Delta) -> list[bytes]:
        """One event for each text. A text that comes without a new token has the id of the last token again."""
        token_ids = delta.token_ids
        if token_ids:
            self._last_token_id = token_ids[-1]
        if len(delta.texts) > len(token_ids):
            token_ids = (*token_ids, self._last_token_id)
        self._finish_reason = delta.finish_reason
        return [self._event(*token) for token in zip(token_ids, delta.texts, strict=True)]

    def ended(self, usage: Usage) -> list[bytes]:
        """The `done` event."""
        return [f"event: done\ndata: {self._summary(usage)}\n\n".encode()]

    def failed(self, error: RequestError) -> bytes:
        """The `error` event, which ends the stream."""
        return b"event: error\ndata: " + api_error(error).body() + b"\n\n"

    def _event(self, token_id: int, text: str) -> bytes:
        """The event of one token."""
        return f'data: {{"token_id":{token_id},"generated_text":{json_text(text)}}}\n\n'.encode()

    def _summary(self, usage: Usage) -> str:
        """The data of the last event."""
        return json.dumps({"finish_reason": self._finish_reason, "usage": usage_document(usage), "seed": self._seed})
