"""POST /v1/completions: OpenAI's older schema, raw prompts in.

Knows no replica: the service does the work.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from serve_app.api.fields import MaxTokens, OpenAIFields, validate_open
from serve_app.api.http.endpoint import Call
from serve_app.api.http.sse import json_text
from serve_app.api.openai.chunks import OpenAIFormat, finite
from serve_app.api.unknown_fields import UnknownFields, unsupported
from serve_app.api.wire import ParsedRequest
from serve_app.core import ModelCard
from serve_app.generation.request import MAX_CHOICES, Prompt
from serve_app.generation.text import Delta


def _prompts(value: Any) -> Any:
    """A string, token ids, or a list of either -> a tuple of strings and tuples of ids."""
    if isinstance(value, str) or _are_ids(value):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(item, str) or _are_ids(item) for item in value):
        expected = "A string, a list of strings, a list of token ids or a list of such lists is expected."
        raise PydanticCustomError("prompt_type", "{expected}", {"expected": expected})
    if not 1 <= len(value) <= MAX_CHOICES:
        raise PydanticCustomError("prompt_value", "{expected}", {"expected": f"1 to {MAX_CHOICES} prompts are taken."})
    return tuple(item if isinstance(item, str) else tuple(item) for item in value)


def _logprobs(value: Any) -> Any:
    return None if value is False else value


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(type(item) is int and item >= 0 for item in value)


class CompletionRequest(OpenAIFields):
    """The body of POST /v1/completions."""

    prompt: Annotated[tuple[str | tuple[int, ...], ...], BeforeValidator(_prompts)]
    max_tokens: MaxTokens | None = None
    """Left out: all that is left of the context (OpenAI's own default of 16 surprises everybody)."""
    logprobs: Annotated[int | None, BeforeValidator(_logprobs)] = Field(None, ge=0, le=5)
    """Null or false: none."""
    parse_special: bool | None = None
    """Whether control tokens in a text are read as such, as on /stream; else they are text."""
    best_of: int | None = Field(None, ge=1)
    """Must equal `n`: nothing is generated that is not returned."""
    add_special_tokens: bool | None = None
    """False is refused. True is the default of other servers."""


class TextFormat(OpenAIFormat):
    """The wire format of POST /v1/completions."""

    name = "text"
    whole_kind = chunk_kind = "text_completion"
    id_prefix = "cmpl"

    async def parse(self, call: Call) -> ParsedRequest:
        """See `WireFormat`."""
        unknown = UnknownFields(call.record, refused=self._refuse_unknown_fields)
        request = await call.run(partial(validate_open, CompletionRequest, call.body or {}, unknown))
        params = request.params(max_tokens=request.max_tokens, logprobs=request.logprobs)
        if request.best_of not in (None, params.n):
            raise unsupported("best_of", "It must equal n.")
        if request.add_special_tokens is False:
            raise unsupported("add_special_tokens", "Prompts begin with BOS where the model's do; send token ids.")
        card = await self._service.ready_model(request.model)
        prompts = await call.run(partial(self._prompts, card, request), items=len(request.prompt))
        resolved = self._service.resolve(
            card, prompts, params, request_id=call.record.request_id, remaining_s=call.remaining_s()
        )
        return self._parsed(resolved, request, "max_tokens")

    def _prompts(self, card: ModelCard, request: CompletionRequest) -> list[Prompt]:
        special = bool(request.parse_special)
        return [
            self._service.render_text(card, item, parse_special=special)
            if isinstance(item, str)
            else Prompt(item, True, "prompt")
            for item in request.prompt
        ]

    def content(self, answer_id: str, index: int, deltas: Sequence[Delta]) -> dict[str, Any]:
        """See `OpenAIFormat`."""
        return {"text": "".join(text for delta in deltas for text in delta.texts)}

    def pieces(self, answer_id: str, delta: Delta) -> Iterable[str]:
        """See `OpenAIFormat`."""
        text = "".join(delta.texts)
        if text or delta.logprobs or delta.finish_reason is not None:
            logprobs = self._logprobs_json(delta) if delta.logprobs else "null"
            reason = "null" if delta.finish_reason is None else f'"{delta.finish_reason}"'
            start = f'{{"index": {delta.choice}, "text": {json_text(text)}'
            yield f'{start}, "logprobs": {logprobs}, "finish_reason": {reason}}}'

    def logprobs(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        """See `OpenAIFormat`: four lists side by side. `text_offset` counts characters from the start of the answer."""
        lists: dict[str, list[Any]] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        for told in (told for delta in deltas for told in delta.logprobs or ()):
            text, logprob = self._tokens.text(told.token_id), finite(told.logprobs.logprob)
            lists["text_offset"].append(told.offset)
            lists["token_logprobs"].append(logprob)
            lists["tokens"].append(text)
            # If several tokens have the same text, the likeliest is kept. The chosen token is always listed.
            likeliest = {self._tokens.text(other): finite(of_other) for other, of_other in reversed(told.logprobs.top)}
            lists["top_logprobs"].append(likeliest | {text: logprob})
        return lists
