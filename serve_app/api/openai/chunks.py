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
from functools import partial
from typing import Any, ClassVar

from serve_app.api.errors import api_error
from serve_app.api.fields import OpenAIFields, StreamOptions
from serve_app.api.http.sse import one_line
from serve_app.api.wire import ParsedRequest, WireFormat, usage_document
from serve_app.chat.token_texts import TokenTexts
from serve_app.core import RequestError
from serve_app.generation.completion import Usage
from serve_app.generation.events import EventWriter
from serve_app.generation.request import ResolvedRequest
from serve_app.generation.service import CompletionService
from serve_app.generation.text import Delta

LOWEST_LOGPROB = -9999.0
"""What OpenAI gives for a token that can't come; JSON has no -Infinity."""


class OpenAIFormat(WireFormat):
    """How one of the two endpoints writes the entries of `choices`."""

    whole_kind: ClassVar[str]
    """`object` of a whole answer."""
    chunk_kind: ClassVar[str]
    """`object` of a chunk."""
    id_prefix: ClassVar[str]

    def __init__(self, service: CompletionService, *, refuse_unknown_fields: bool) -> None:
        """Unknown fields are ignored, and named in the answer, unless they are to be refused."""
        self._service = service
        self._refuse_unknown_fields = refuse_unknown_fields
        self._tokens = TokenTexts(service.tokenizer)

    def _parsed(self, resolved: ResolvedRequest, fields: OpenAIFields, max_tokens_param: str) -> ParsedRequest:
        """The `settings` are `envelope` (the fields around the choices in every chunk), `usage` (whether the usage is
        wanted at the end) and `continuous_usage` (whether it is wanted in every chunk)."""
        envelope: dict[str, Any] = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "object": self.chunk_kind if fields.stream else self.whole_kind,
            "created": int(time.time()),
            "model": resolved.model,
            # OpenAI's id of a backend configuration: the same fingerprint and seed give the same answer.
            "system_fingerprint": "fp_" + hashlib.sha256(resolved.fingerprint.encode()).hexdigest()[:10],
        }
        options = fields.stream_options or StreamOptions()
        settings = {
            "envelope": envelope,
            "usage": bool(options.include_usage),
            "continuous_usage": bool(options.include_usage and options.continuous_usage_stats),
        }
        whole = None if fields.stream else partial(self._whole, envelope)
        return ParsedRequest(resolved, whole, settings, max_tokens_param)

    def writer(self, request: ResolvedRequest, settings: Mapping[str, Any]) -> EventWriter:
        """See `WireFormat`."""
        return ChunkWriter(self, request, settings)

    def _whole(self, envelope: Mapping[str, Any], gained: Sequence[Sequence[Delta]], usage: Usage) -> dict[str, Any]:
        return {
            **envelope,
            "choices": [self._entry(envelope["id"], index, of_choice) for index, of_choice in enumerate(gained)],
            "usage": usage_document(usage),
        }

    def _entry(self, answer_id: str, index: int, deltas: Sequence[Delta]) -> dict[str, Any]:
        """The entry of choice `index` in a whole answer, from all that it gained."""
        return {
            "index": index,
            **self.content(answer_id, index, deltas),
            "logprobs": None if all(delta.logprobs is None for delta in deltas) else self.logprobs(deltas),
            "finish_reason": deltas[-1].finish_reason,
        }

    def _logprobs_json(self, delta: Delta) -> str:
        """The `logprobs` of a chunk."""
        return one_line(json.dumps(self.logprobs([delta]), ensure_ascii=False))

    @abstractmethod
    def content(self, answer_id: str, index: int, deltas: Sequence[Delta]) -> dict[str, Any]:
        """The field that holds what the model said, in the entry of choice `index` of a whole answer."""

    @abstractmethod
    def logprobs(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        """The `logprobs` of an entry, where they were asked for."""

    def opening(self, index: int) -> str:
        """The JSON of choice `index`'s entry before its first token; "": there is none."""
        return ""

    @abstractmethod
    def pieces(self, answer_id: str, delta: Delta) -> Iterable[str]:
        """The JSON of the entries that `delta` adds to the stream; each goes into a chunk of its own."""


class ChunkWriter(EventWriter):
    """OpenAI's chunks, the usage where it was asked for, and `[DONE]`."""

    def __init__(self, entries: OpenAIFormat, request: ResolvedRequest, settings: Mapping[str, Any]) -> None:
        """`settings` are those of the `ParsedRequest`."""
        self._entries = entries
        self._choices = request.choices
        self._answer_id: str = settings["envelope"]["id"]
        self._include_usage: bool = settings["usage"]
        self._head = f'data: {json.dumps(settings["envelope"])[:-1]}, "choices": ['
        self._end = '], "usage": null}\n\n' if self._include_usage else "]}\n\n"
        self._continuous_usage: bool = settings["continuous_usage"]
        self._prompt_tokens = request.prompt_tokens
        self._completion_tokens = 0

    def opened(self) -> list[bytes]:
        """The opening chunk of each choice, in the formats that have one."""
        return self._chunks(self._entries.opening(index) for index in range(self._choices))

    def gained(self, delta: Delta) -> list[bytes]:
        """The chunks that carry `delta`; none if it adds nothing to the answer yet."""
        self._completion_tokens += len(delta.token_ids)
        return self._chunks(self._entries.pieces(self._answer_id, delta))

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


def finite(logprob: float) -> float:
    """The logprob as OpenAI gives it: at least `LOWEST_LOGPROB`."""
    return max(logprob, LOWEST_LOGPROB)
