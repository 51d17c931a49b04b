"""How a resumable stream is written down: a document that says how to make it, then what it has said so far.

Promises that what is read is what was written, to the last bit of a float. Knows no store; JSON and not pickle, since
another version of this program, or whoever can write to the store, may have written it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from serve_app.core import (
    Failure,
    FailureCode,
    FinishReason,
    GenerationStats,
    Reply,
    TokenBatch,
    TokenLogprobs,
)
from serve_app.generation.request import ResolvedRequest


class RecordError(Exception):
    """These bytes are not a document or a record of this version."""


@dataclass(frozen=True, slots=True)
class StreamDocument:
    """All that an ingress needs to continue a stream that another one began."""

    request: ResolvedRequest
    """As first made: without output. `remaining_s` counts from the journal's creation."""
    caller: str
    """Who may resume it: a digest of what the caller authenticated with."""
    wire_format: str
    """The name of the one in which its events are written."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What that format's writer needs besides the request: JSON."""


_DOCUMENT = TypeAdapter(StreamDocument)


def write_document(document: StreamDocument) -> bytes:
    """As bytes of JSON."""
    return _DOCUMENT.dump_json(document)


def read_document(content: bytes) -> StreamDocument:
    """Raises `RecordError`."""
    try:
        return _DOCUMENT.validate_json(content)
    except ValidationError as error:
        raise RecordError("this is no document of a stream") from error


def write_reply(choice: int, reply: Reply) -> bytes:
    """One line: `[choice, first index, ids, logprobs | null, finish reason | null, cached prompt tokens | null,
    numerics id]`, the last four only where there is something to say; or `{failure}`. No line break inside."""
    if isinstance(reply, Failure):
        failure = {"code": reply.code, "message": reply.message, "retry_after_s": reply.retry_after_s}
        return json.dumps(failure).encode()
    line: list[Any] = [choice, reply.first_index, reply.token_ids]
    if reply.logprobs is not None or reply.finish_reason is not None or reply.stats is not None:
        line.append(None if reply.logprobs is None else [(entry.logprob, entry.top) for entry in reply.logprobs])
        unknown = None if reply.finish_reason is None else 0  # not null with an end: earlier versions add it up
        line += [reply.finish_reason, unknown if reply.stats is None else reply.stats.cached_prompt_tokens]
        if reply.stats is not None and reply.stats.numerics_id:
            line.append(reply.stats.numerics_id)
    return json.dumps(line, separators=(",", ":")).encode()


def join_replies(lines: Sequence[bytes]) -> bytes:
    """The record of all replies of one tick."""
    return b"\n".join(lines)


def read_record(record: bytes) -> Iterator[tuple[int, Reply]]:
    """(choice, reply) of each line; a failure has choice 0, since it ends the whole stream. Raises `RecordError`."""
    try:
        for line in record.split(b"\n"):
            yield _read_line(json.loads(line))
    except (ValueError, TypeError, KeyError) as error:
        raise RecordError("this is no record of a stream") from error


def _read_line(line: Any) -> tuple[int, Reply]:
    if isinstance(line, dict):
        return 0, Failure(FailureCode(line["code"]), line["message"], line["retry_after_s"])
    choice, first_index, ids, *more = line
    if not more:
        return choice, TokenBatch(first_index, tuple(ids))
    logprobs, reason, cached, *numerics_id = more
    return choice, TokenBatch(
        first_index,
        tuple(ids),
        None
        if logprobs is None
        else tuple(TokenLogprobs(logprob, tuple((id_, p) for id_, p in top)) for logprob, top in logprobs),
        None if reason is None else FinishReason(reason),
        None
        if cached is None
        else GenerationStats(cached_prompt_tokens=cached, numerics_id=numerics_id[0] if numerics_id else ""),
    )
