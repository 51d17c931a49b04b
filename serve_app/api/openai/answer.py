"""What both of OpenAI's completion endpoints do with a completion: one object, or a stream of chunks.

Promises OpenAI's envelope and the same text both ways, and that a token costs no more than its own JSON. What an entry
of `choices` looks like is the endpoint's.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, ClassVar

from starlette.responses import Response

from serve_app.api.errors import ApiError
from serve_app.api.events import EventWriter, WireFormat, events_of
from serve_app.api.fields import OpenAIFields
from serve_app.api.http.endpoint import Call
from serve_app.api.http.inline import INLINE_ENTRIES
from serve_app.api.http.sse import EventStream, StreamSettings, event_stream
from serve_app.api.resume import Resume
from serve_app.api.unknown_fields import UnknownFields
from serve_app.core import Fingerprint
from serve_app.generation.service import Completion, CompletionService, Plan, Usage
from serve_app.generation.text import Delta

_JSON = json.JSONEncoder(ensure_ascii=False)
LOWEST_LOGPROB = -9999.0
"""What OpenAI gives for a token that can't come; JSON has no -Infinity."""


class ChoiceSchema(ABC):
    """How one endpoint writes the entries of `choices`. Made for one completion."""

    whole_kind: ClassVar[str]
    """`object` of a whole answer."""
    chunk_kind: ClassVar[str]
    """`object` of a chunk."""
    id_prefix: ClassVar[str]

    @abstractmethod
    def whole(self, index: int, deltas: Sequence[Delta]) -> dict[str, Any]:
        """The entry of choice `index` in a whole answer, from all that it gained."""

    @abstractmethod
    def opening(self, index: int) -> str:
        """The JSON of choice `index`'s entry before its first token, or ""."""

    @abstractmethod
    def pieces(self, delta: Delta) -> Iterable[str]:
        """The JSON of the entries that tell `delta`, one a chunk."""


@dataclass(frozen=True, slots=True)
class Answerer:
    """How both endpoints answer once they have a plan."""

    service: CompletionService
    resume: Resume
    settings: StreamSettings
    refuse_unknown_fields: bool = False
    """Else they are ignored, and named in the answer."""

    def unknown_fields(self, call: Call) -> UnknownFields:
        """What becomes of the unknown fields of this request."""
        return UnknownFields(call.record, refused=self.refuse_unknown_fields)

    async def answer(
        self, call: Call, plan: Plan, request: OpenAIFields, schema: ChoiceSchema, wire: WireFormat
    ) -> Response | EventStream:
        """The response in the form that was asked for. Raises `ApiError`.

        The seed goes out in a header, since OpenAI's objects have no place for it.
        """
        headers = {"x-seed": str(plan.seed)}
        if not request.stream:
            completion = self.service.start(plan, call.record)
            content = await _whole(plan, completion, schema)
            return Response(content, headers=headers, media_type="application/json")
        fields = {
            "envelope": _envelope(plan, schema.chunk_kind, schema.id_prefix),
            "usage": request.include_usage,
            "continuous_usage": request.continuous_usage,
        }
        if self.resume.wanted(call):
            return await self.resume.open(call, plan, wire, fields)
        writer = ChunkEvents(schema, plan, fields)
        chunks = events_of(self.service.start(plan, call.record), writer)
        return await event_stream(chunks, on_error=writer.failed, settings=self.settings, headers=headers)


async def _whole(plan: Plan, completion: Completion, schema: ChoiceSchema) -> bytes:
    gained: list[list[Delta]] = [[] for _ in range(plan.choices)]
    async with completion, aclosing(completion.deltas()) as deltas:
        async for delta in deltas:
            gained[delta.choice].append(delta)
    usage = completion.usage
    entries = usage.completion_tokens * (1 + (plan.requests[0].sampling.logprobs or 0))
    in_loop = entries <= INLINE_ENTRIES

    def written() -> bytes:
        document = {
            **_envelope(plan, schema.whole_kind, schema.id_prefix),
            "choices": [schema.whole(index, of_choice) for index, of_choice in enumerate(gained)],
            "usage": usage.document(),
        }
        # Of a large document piece by piece: the whole at once is one call, in which no other thread runs.
        pieces = [_JSON.encode(document)] if in_loop else _JSON.iterencode(document)
        return "".join(pieces).encode()

    return written() if in_loop else await asyncio.to_thread(written)


class ChunkEvents(EventWriter):
    """OpenAI's chunks, the usage where it was asked for, and `[DONE]`."""

    def __init__(self, schema: ChoiceSchema, plan: Plan, fields: Mapping[str, Any]) -> None:
        """`fields`: `envelope`, the same in every chunk, `usage`: whether the usage is wanted at the end, and
        `continuous_usage`: whether in every chunk."""
        self._schema = schema
        self._choices = plan.choices
        self._include_usage: bool = fields["usage"]
        self._head = f'data: {json.dumps(fields["envelope"])[:-1]}, "choices": ['
        self._end = '], "usage": null}\n\n' if self._include_usage else "]}\n\n"
        self._continuous_usage = bool(fields.get("continuous_usage"))  # no stream of an older ingress has it
        self._prompt_tokens = plan.prompt_tokens
        self._completion_tokens = 0

    def opened(self) -> list[bytes]:
        """The chunk of each choice that says who speaks."""
        return self._chunks(self._schema.opening(index) for index in range(self._choices))

    def gained(self, delta: Delta) -> list[bytes]:
        """A chunk for its text and one for its end, where there is something to say."""
        self._completion_tokens += len(delta.token_ids)
        return self._chunks(self._schema.pieces(delta))

    def ended(self, usage: Usage) -> list[bytes]:
        """The last ones."""
        events = [b"data: [DONE]\n\n"]
        if self._include_usage:
            chunk = f'{self._head}], "usage": {json.dumps(usage.document())}}}\n\n'
            events.insert(0, chunk.encode())
        return events

    @staticmethod
    def failed(error: ApiError) -> bytes:
        """An error in the middle of a stream: OpenAI's clients raise it."""
        return b"data: " + error.body() + b"\n\n"

    def _chunks(self, pieces: Iterable[str]) -> list[bytes]:
        end = self._usage_so_far() if self._continuous_usage else self._end
        return [f"{self._head}{piece}{end}".encode() for piece in pieces if piece]

    def _usage_so_far(self) -> str:
        """Without the cache hits, which count when the prompt is done."""
        prompt, completion = self._prompt_tokens, self._completion_tokens
        counts = f'"prompt_tokens": {prompt}, "completion_tokens": {completion}, "total_tokens": {prompt + completion}'
        return f'], "usage": {{{counts}}}}}\n\n'


def _envelope(plan: Plan, kind: str, id_prefix: str) -> dict[str, object]:
    """The fields around the choices, the same in every chunk of a stream."""
    return {
        "id": f"{id_prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": plan.model,
        "system_fingerprint": system_fingerprint(plan.fingerprint),
    }


def system_fingerprint(fingerprint: Fingerprint) -> str:
    """The weights as OpenAI names a backend configuration: same fingerprint, same seed, same answer."""
    return "fp_" + hashlib.sha256(fingerprint.encode()).hexdigest()[:10]


def finite(logprob: float) -> float:
    """As OpenAI tells it."""
    return max(logprob, LOWEST_LOGPROB)
