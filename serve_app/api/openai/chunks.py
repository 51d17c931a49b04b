"""What OpenAI's two completion endpoints have in common: the envelope of a document, and the chunks of a stream.

Promises OpenAI's envelope, the same text in a document and in a stream, and that a token costs no more than its own
JSON. Each endpoint writes its own entries of `choices`.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Self

from msgspec.structs import asdict

from serve_app.api.errors import api_error
from serve_app.api.fields import OpenAIFields, StreamOptions
from serve_app.api.http.endpoint import Call
from serve_app.api.http.sse import one_line
from serve_app.api.openai.extras import NO_EXTRAS, Extras, prompt_logprobs
from serve_app.api.priority import FLEX
from serve_app.api.wire import ParsedRequest, WireFormat, usage_document
from serve_app.chat.token_texts import TokenNumbers, TokenTexts
from serve_app.core import ModelCard, Priority, RequestError
from serve_app.generation.completion import Usage
from serve_app.generation.events import EventWriter
from serve_app.generation.request import CompletionParams, ResolvedRequest
from serve_app.generation.service import CompletionService
from serve_app.generation.text import Delta


class OpenAIFormat(WireFormat):
    """How one of the two endpoints writes the entries of `choices`."""

    whole_kind: ClassVar[str]
    """`object` of a whole answer."""
    chunk_kind: ClassVar[str]
    """`object` of a chunk."""
    id_prefix: ClassVar[str]
    prompts_in_choices: ClassVar[bool]
    """Whether what is shown of a prompt is in the entries of its choices, else beside `choices`."""

    def __init__(self, service: CompletionService, *, refuse_unknown_fields: bool) -> None:
        """Unknown fields are ignored, and named in the answer, unless they are to be refused."""
        self._service = service
        self._refuse_unknown_fields = refuse_unknown_fields
        self._tokens = TokenTexts(service.tokenizer)
        self._extras = NO_EXTRAS
        self._request: ResolvedRequest | None = None
        """The request, in a copy of this format that was made for it."""

    def _parsed(
        self,
        resolved: ResolvedRequest,
        fields: OpenAIFields,
        max_tokens_param: str,
        constraint_param: str,
        *,
        echo: bool = False,
    ) -> ParsedRequest:
        """The `settings` are `envelope` (the fields around the choices in every chunk), `usage` (whether the usage is
        wanted at the end), `continuous_usage` (whether it is wanted in every chunk) and the `extras`, if any."""
        envelope: dict[str, Any] = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "object": self.chunk_kind if fields.stream else self.whole_kind,
            "created": int(time.time()),
            "model": resolved.model,
            # OpenAI's id of a backend configuration: the same fingerprint and seed give the same answer.
            "system_fingerprint": "fp_" + hashlib.sha256(resolved.fingerprint.encode()).hexdigest()[:10],
        }
        if fields.service_tier is not None:
            envelope["service_tier"] = FLEX if resolved.priority is Priority.BATCH else "default"
        options = fields.stream_options or StreamOptions()
        extras = Extras(
            token_ids=bool(fields.return_token_ids),
            tokens_as_ids=bool(fields.return_tokens_as_token_ids),
            echo=echo,
            prompt_logprobs=fields.prompt_logprobs,
        )
        settings: dict[str, Any] = {
            "envelope": envelope,
            "usage": bool(options.include_usage),
            "continuous_usage": bool(options.include_usage and options.continuous_usage_stats),
        }
        if extras != NO_EXTRAS:
            settings["extras"] = asdict(extras)
        whole = None if fields.stream else partial(self._showing(resolved, extras)._whole, envelope)
        return ParsedRequest(resolved, whole, settings, max_tokens_param, constraint_param)

    async def _with_prediction(
        self, call: Call, card: ModelCard, fields: OpenAIFields, params: CompletionParams
    ) -> CompletionParams:
        """The parameters with what the caller expects of the answer, as ids. Raises `RequestError`."""
        if fields.prediction is None:
            return params
        encode = partial(self._service.prediction, card, fields.prediction.content)
        return replace(params, predicted_token_ids=await call.run(encode))

    def writer(self, request: ResolvedRequest, settings: Mapping[str, Any]) -> EventWriter:
        """See `WireFormat`."""
        return ChunkWriter(self._showing(request, Extras(**settings.get("extras", {}))), request, settings)

    def _showing(self, request: ResolvedRequest, extras: Extras) -> Self:
        """This format for one request, whose answer shows these extras."""
        if extras == NO_EXTRAS:
            return self
        made = copy(self)
        made._extras, made._request = extras, request
        if extras.tokens_as_ids:
            made._tokens = TokenNumbers(self._service.tokenizer)
        return made

    def _whole(self, envelope: Mapping[str, Any], gained: Sequence[Sequence[Delta]], usage: Usage) -> dict[str, Any]:
        document = {
            **envelope,
            "choices": [self._entry(envelope["id"], index, of_choice) for index, of_choice in enumerate(gained)],
            "usage": usage_document(usage),
        }
        if self._request is None:
            return document
        per_prompt = self._request.choices_per_prompt
        for index, entry in enumerate(document["choices"] if self.prompts_in_choices else [document]):
            entry |= self._of_prompt(index, gained[index - index % per_prompt])
        return document

    def _entry(self, answer_id: str, index: int, deltas: Sequence[Delta]) -> dict[str, Any]:
        """The entry of choice `index` in a whole answer, from all that it gained."""
        entry = {
            "index": index,
            **self.content(answer_id, index, deltas),
            "logprobs": None if all(delta.logprobs is None for delta in deltas) else self.logprobs(deltas),
            "finish_reason": deltas[-1].finish_reason,
        }
        if self._extras.token_ids:
            entry["token_ids"] = [token_id for delta in deltas for token_id in delta.token_ids]
        return entry

    def prompt_ids(self, choice: int) -> Sequence[int]:
        """The prompt of a choice, if its ids are to be shown; else nothing."""
        if self._request is None or not self._extras.token_ids:
            return ()
        return self._request.requests[choice].prompt_token_ids

    def _of_prompt(self, choice: int, deltas: Sequence[Delta]) -> dict[str, Any]:
        """What is shown of the prompt of this choice; `deltas`: those of the first choice with this prompt."""
        shown: dict[str, Any] = {}
        if ids := self.prompt_ids(choice):
            shown["prompt_token_ids"] = list(ids)
        if (top := self._extras.prompt_logprobs) is not None and self._request is not None:
            scores = next(delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs is not None)
            ids = self._request.requests[choice].prompt_token_ids
            shown["prompt_logprobs"] = prompt_logprobs(ids, scores, top, self._tokens)
        return shown

    def _logprobs_json(self, delta: Delta) -> str:
        """The `logprobs` of a chunk."""
        return one_line(json.dumps(self.logprobs([delta]), ensure_ascii=False))

    @abstractmethod
    def content(self, answer_id: str, index: int, deltas: Sequence[Delta]) -> dict[str, Any]:
        """The field that holds what the model said, in the entry of choice `index` of a whole answer."""

    @abstractmethod
    def logprobs(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        """The `logprobs` of an entry, where they were asked for."""

    def opening(self, index: int, *, may_call: bool) -> str:
        """The JSON of choice `index`'s entry before its first token; "": there is none. `may_call`: it has tools."""
        return ""

    def shown_pieces(self, answer_id: str, delta: Delta) -> list[str]:
        """The `pieces`, and the ids of the delta's tokens where they are to be shown."""
        pieces = [piece for piece in self.pieces(answer_id, delta) if piece]
        if self._extras.token_ids and (delta.token_ids or delta.finish_reason is not None):
            *pieces, last = pieces or [self.empty_piece(delta.choice)]
            pieces.append(f'{last[:-1]}, "token_ids": {json.dumps(delta.token_ids)}}}')
        return pieces

    @abstractmethod
    def empty_piece(self, choice: int) -> str:
        """The JSON of an entry that adds nothing to its choice."""

    @abstractmethod
    def pieces(self, answer_id: str, delta: Delta) -> Iterable[str]:
        """The JSON of the entries that `delta` adds to the stream; each goes into a chunk of its own."""


class ChunkWriter(EventWriter):
    """OpenAI's chunks, the usage where it was asked for, and `[DONE]`."""

    def __init__(self, entries: OpenAIFormat, request: ResolvedRequest, settings: Mapping[str, Any]) -> None:
        """`settings` are those of the `ParsedRequest`."""
        self._entries = entries
        self._choices = request.choices
        self._may_call = request.answer is not None and bool(request.answer.tools)
        self._answer_id: str = settings["envelope"]["id"]
        self._include_usage: bool = settings["usage"]
        self._head = f'data: {json.dumps(settings["envelope"])[:-1]}, "choices": ['
        self._end = '], "usage": null}\n\n' if self._include_usage else "]}\n\n"
        self._continuous_usage: bool = settings["continuous_usage"]
        self._prompt_tokens = request.prompt_tokens
        self._completion_tokens = 0

    def opened(self) -> list[bytes]:
        """The opening chunk of each choice, in the formats that have one."""
        chunks = self._chunks(self._entries.opening(index, may_call=self._may_call) for index in range(self._choices))
        if not self._entries.prompts_in_choices and (ids := self._entries.prompt_ids(0)):
            chunks[0] = chunks[0].removesuffix(b"}\n\n") + f', "prompt_token_ids": {json.dumps(ids)}}}\n\n'.encode()
        return chunks

    def gained(self, delta: Delta) -> list[bytes]:
        """The chunks that carry `delta`; none if it adds nothing to the answer yet."""
        self._completion_tokens += len(delta.token_ids)
        return self._chunks(self._entries.shown_pieces(self._answer_id, delta))

    def ended(self, usage: Usage) -> list[bytes]:
        """The usage if it was asked for, and `[DONE]`."""
        events = [b"data: [DONE]\n\n"]
        if self._include_usage:
            chunk = f'{self._head}], "usage": {json.dumps(usage_document(usage))}}}\n\n'
            events.insert(0, chunk.encode())
        return events

    def failed(self, error: RequestError) -> bytes:
        """An error in the middle of a stream: OpenAI's clients raise it."""
        return b"data: " + api_error(error).body() + b"\n\n"

    def _chunks(self, pieces: Iterable[str]) -> list[bytes]:
        end = self._end
        if self._continuous_usage:  # without cached tokens, which only the last usage has
            prompt, all_ = self._prompt_tokens, self._prompt_tokens + self._completion_tokens
            counts = f'"prompt_tokens": {prompt}, "completion_tokens": {all_ - prompt}, "total_tokens": {all_}'
            end = f'], "usage": {{{counts}}}}}\n\n'
        return [f"{self._head}{piece}{end}".encode() for piece in pieces if piece]
