"""POST /v1/completions: OpenAI's older schema, raw prompts in.

Knows no replica: the service does the work.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from serve_app.api.errors import bad_request
from serve_app.api.fields import NO_LIMIT, OpenAIFields, off_if_false, validate_open
from serve_app.api.http.endpoint import Call
from serve_app.api.http.sse import json_text, one_line
from serve_app.api.openai.chunks import OpenAIFormat
from serve_app.api.openai.echo import Echo
from serve_app.api.openai.extras import Extras, finite
from serve_app.api.structured import StructuredFields, wanted
from serve_app.api.unknown_fields import UnknownFields, unsupported
from serve_app.api.wire import ParsedRequest
from serve_app.core import ModelCard, PromptLogprobs, TokenLogprobs
from serve_app.generation.request import MAX_CHOICES, Prompt, ResolvedRequest
from serve_app.generation.text import Delta

_ECHOED_AT_ONCE = 128
"""Tokens of a prompt in one chunk of a stream, where their logprobs are shown."""


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


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(type(item) is int and item >= 0 for item in value)


class CompletionRequest(OpenAIFields, StructuredFields):
    """The body of POST /v1/completions."""

    prompt: Annotated[
        tuple[str | tuple[int, ...], ...],
        BeforeValidator(_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
    ]
    """Text or token ids to be continued, or several of either."""
    suffix: str | None = None
    """The text after the gap that the answer fills; needs a model with tokens for that."""
    echo: bool | None = None
    max_tokens: int | None = Field(None, ge=NO_LIMIT)
    """Left out: all that is left of the context (OpenAI's own default of 16 surprises everybody). 0: no answer, where
    something of the prompt is shown."""
    logprobs: Annotated[int | None, off_if_false] = Field(None, ge=0, le=5)
    """Null or false: none."""
    parse_special: bool | None = None
    """Whether control tokens in a text are read as such, as on /stream; else they are text."""
    best_of: int | None = Field(None, ge=1)
    """Must equal `n`: nothing is generated that is not returned."""
    add_special_tokens: bool | None = None
    """False: texts get no BOS."""


class TextFormat(OpenAIFormat):
    """The wire format of POST /v1/completions."""

    name = "text"
    whole_kind = chunk_kind = "text_completion"
    id_prefix = "cmpl"
    prompts_in_choices = True
    _echo: Echo | None = None
    """The prompts, in a copy for a request that shows them."""
    _scores_prompt = False
    """Whether their logprobs are among those of the answer."""

    async def parse(self, call: Call) -> ParsedRequest:
        """See `WireFormat`."""
        unknown = UnknownFields(call.record, refused=self._refuse_unknown_fields)
        request = await call.run(partial(validate_open, CompletionRequest, call.body or {}, unknown))
        _check(request)
        card = await self._service.ready_model(request.model, call.caller.models)
        text = await call.run(partial(wanted, request, unknown))
        prompts, ends = await call.run(partial(self._prompts, card, request), items=len(request.prompt))
        prompts = [replace(prompt, constraint=text.grammar) for prompt in prompts]
        params = request.params(max_tokens=request.max_tokens, logprobs=request.logprobs, echo=bool(request.echo))
        params = replace(params, stop_token_ids=(*params.stop_token_ids, *ends))
        params = await self._with_prediction(call, card, request, params)
        resolved = self._service.resolve(
            card, prompts, params, request_id=call.record.request_id, remaining_s=call.remaining_s()
        )
        return self._parsed(resolved, request, "max_tokens", text.param, echo=params.echo)

    def _prompts(self, card: ModelCard, request: CompletionRequest) -> tuple[list[Prompt], tuple[int, ...]]:
        """The prompts, and the ids that end an answer because of their form."""
        special = bool(request.parse_special)
        if request.suffix:
            prefixes = [item for item in request.prompt if isinstance(item, str)]
            suffix = request.suffix
            gaps = [self._service.render_gap(card, each, suffix, parse_special=special) for each in prefixes]
            return [prompt for prompt, _ in gaps], gaps[0][1]
        render = partial(
            self._service.render_text,
            card,
            parse_special=special,
            add_bos=request.add_special_tokens is not False,
            truncates=request.truncate_prompt_tokens is not None,
            room=0 if request.max_tokens == 0 else 1,
        )
        return [render(item) if isinstance(item, str) else Prompt(item, True, "prompt") for item in request.prompt], ()

    def _showing(self, request: ResolvedRequest, extras: Extras) -> Self:
        """See `OpenAIFormat`."""
        made = super()._showing(request, extras)
        if extras.echo:
            made._echo = Echo(self._service.tokenizer, request)
            made._scores_prompt = request.requests[0].sampling.logprobs is not None
        return made

    def content(self, answer_id: str, index: int, deltas: Sequence[Delta]) -> dict[str, Any]:
        """See `OpenAIFormat`."""
        prompt = "" if self._echo is None else self._echo.text(index)
        return {"text": prompt + "".join(text for delta in deltas for text in delta.texts)}

    def opening(self, index: int, *, may_call: bool) -> str:
        """See `OpenAIFormat`: the prompt, unless its logprobs are to come with it, and its ids."""
        ids = self.prompt_ids(index)
        shown = self._echo is not None and not self._scores_prompt
        if not ids and not shown:
            return ""
        text = self._echo.text(index) if self._echo is not None and shown else ""
        of_prompt = f', "prompt_token_ids": {json.dumps(ids)}' if ids else ""
        return f'{{"index": {index}, "text": {json_text(text)}, "logprobs": null, "finish_reason": null{of_prompt}}}'

    def empty_piece(self, choice: int) -> str:
        """See `OpenAIFormat`."""
        return f'{{"index": {choice}, "text": "", "logprobs": null, "finish_reason": null}}'

    def pieces(self, answer_id: str, delta: Delta) -> Iterable[str]:
        """See `OpenAIFormat`."""
        if delta.prompt_logprobs is not None and self._scores_prompt:
            yield from self._echoed(delta.choice, delta.prompt_logprobs)
            delta = delta._replace(prompt_logprobs=None)
        text = "".join(delta.texts)
        if text or delta.logprobs or delta.finish_reason is not None:
            logprobs = self._logprobs_json(delta) if delta.logprobs else "null"
            reason = "null" if delta.finish_reason is None else f'"{delta.finish_reason}"'
            start = f'{{"index": {delta.choice}, "text": {json_text(text)}'
            yield f'{start}, "logprobs": {logprobs}, "finish_reason": {reason}}}'

    def logprobs(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        """See `OpenAIFormat`: four lists side by side. `text_offset` counts characters from the start of the text."""
        lists = _new_lists()
        before = len(self._echo.text(deltas[0].choice)) if self._echo is not None and deltas else 0
        for delta in deltas:
            if delta.prompt_logprobs is not None and self._scores_prompt:
                for offset, token_id, logprobs in self._of_prompt_tokens(delta.choice, delta.prompt_logprobs):
                    self._list(lists, offset, token_id, logprobs)
            for told in delta.logprobs or ():
                self._list(lists, before + told.offset, told.token_id, told.logprobs)
        return lists

    def _list(self, lists: dict[str, list[Any]], offset: int, token_id: int, logprobs: TokenLogprobs | None) -> None:
        """Add a token to the lists; `logprobs` None: nothing is known of it."""
        text = self._tokens.text(token_id)
        lists["text_offset"].append(offset)
        lists["tokens"].append(text)
        if logprobs is None:
            lists["token_logprobs"].append(None)
            lists["top_logprobs"].append(None)
            return
        logprob = finite(logprobs.logprob)
        likeliest: dict[str, float] = {}
        for other, of_other in logprobs.top:
            name = self._tokens.text(other)
            if other != token_id and (name == text or name in likeliest):
                name = f"token_id:{other}"  # several tokens may have the same text, such as parts of characters
            likeliest[name] = finite(of_other)
        likeliest[text] = logprob  # the chosen token is always listed
        lists["token_logprobs"].append(logprob)
        lists["top_logprobs"].append(likeliest)

    def _of_prompt_tokens(self, choice: int, scores: PromptLogprobs) -> Iterator[tuple[int, int, TokenLogprobs | None]]:
        """(offset, id, logprobs) of each token of the prompt; the first one has no logprobs."""
        assert self._echo is not None
        assert self._request is not None
        ids, most = self._echo.ids(choice), self._request.requests[0].sampling.logprobs
        told = ((logprobs if scores.top == most else _fewer(logprobs, most)) for logprobs, _ in scores.tokens())
        yield from zip(self._echo.offsets(choice), ids, chain((None,), told), strict=True)

    def _echoed(self, choice: int, scores: PromptLogprobs) -> Iterator[str]:
        """The JSON of the entries that show the prompt with its logprobs, some tokens each."""
        assert self._echo is not None
        text, tokens = self._echo.text(choice), list(self._of_prompt_tokens(choice, scores))
        for first in range(0, len(tokens), _ECHOED_AT_ONCE):
            lists, end = _new_lists(), first + _ECHOED_AT_ONCE
            for token in tokens[first:end]:
                self._list(lists, *token)
            piece = text[tokens[first][0] : tokens[end][0] if end < len(tokens) else None]
            logprobs = one_line(json.dumps(lists, ensure_ascii=False))
            start = f'{{"index": {choice}, "text": {json_text(piece)}'
            yield f'{start}, "logprobs": {logprobs}, "finish_reason": null}}'


def _new_lists() -> dict[str, list[Any]]:
    return {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}


def _fewer(logprobs: TokenLogprobs, top: int | None) -> TokenLogprobs:
    return TokenLogprobs(logprobs.logprob, logprobs.top[:top])


def _check(request: CompletionRequest) -> None:
    """Raise `ApiError` for fields that contradict each other."""
    if request.best_of not in (None, request.n or 1):
        raise unsupported("best_of", "It must equal n.")
    if request.max_tokens == 0 and not request.echo and request.prompt_logprobs is None:
        message = "max_tokens must be at least 1, or -1 for the rest of the context; 0 needs echo or prompt_logprobs."
        raise bad_request(f"Invalid value for 'max_tokens': {message}", param="max_tokens", code="invalid_value")
    if not request.suffix:
        return
    if request.echo or request.truncate_prompt_tokens is not None or request.add_special_tokens is False:
        message = "suffix can't be combined with echo, truncate_prompt_tokens or add_special_tokens: false."
        raise bad_request(message, param="suffix", code="invalid_value")
    if not all(isinstance(item, str) for item in request.prompt):
        raise bad_request("suffix needs a prompt of text.", param="suffix", code="invalid_value")
