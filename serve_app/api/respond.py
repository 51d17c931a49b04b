"""Decides for every wire format how a request is answered: as one document, as a stream or as a resumable stream.

Promises the same text each way. Knows no wire format.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from functools import partial

from starlette.responses import Response

from serve_app.access.tenancy import of_tenant
from serve_app.api.http.endpoint import Call
from serve_app.api.http.sse import EventStream, StreamSettings
from serve_app.api.priority import require_allowed
from serve_app.api.rate_limits import fit, reserve
from serve_app.api.resume import Resume
from serve_app.api.structured import refusal
from serve_app.api.wire import ParsedRequest, Whole, WireFormat
from serve_app.generation.events import EventWriter
from serve_app.generation.request import ResolvedRequest
from serve_app.generation.service import CompletionService, RunningCompletion
from serve_app.generation.text import Delta
from serve_app.observability.logs import RequestRecord

INLINE_ENTRIES = 2_000
"""Entries of the largest answer that is written in the event loop: tokens, the alternatives listed with them, and both
of the prompt where its logprobs are shown.
Writing 2,000 takes about 10 ms."""

_JSON = json.JSONEncoder(ensure_ascii=False)


class Responder:
    """Answers for all endpoints that generate."""

    def __init__(self, service: CompletionService, resume: Resume, settings: StreamSettings) -> None:
        self._service = service
        self._resume = resume
        self._settings = settings

    async def answer(self, wire: WireFormat, call: Call) -> Response | EventStream:
        """The answer of an endpoint that speaks this format. Raises `RequestError`.

        The seed goes out in a header, since not every format has a place for it.
        """
        if (rest := await self.continued(call)) is not None:
            return rest
        parsed = await self.accept(call, await wire.parse(call))
        await reserve(call, parsed.resolved)
        return await self.begin(wire, call, parsed)

    async def continued(self, call: Call) -> Response | EventStream | None:
        """The rest of an earlier stream that the request names; None for a new request.

        Raises `RequestError`, also for a new request that would not start in time, or whose caller is known to have no
        requests left: before its prompt costs anything.
        """
        rest = await self._resume.continued(call)
        if call.reservation is not None:
            if rest is not None:
                call.reservation.costs_nothing()
            else:
                call.reservation.check()
        if rest is None:
            self._service.refuse_when_full(call.caller.tenant, call.caller.weight, call.remaining_s())
        return rest

    async def accept(self, call: Call, parsed: ParsedRequest) -> ParsedRequest:
        """Check what only this process can check of a request that is parsed, and note what its answer will tell.

        Returns the request with what its caller's key says of it, cut to what that allows. Raises `RequestError`.
        """
        require_allowed(parsed.resolved.priority, call.caller)
        if fault := await self._service.constraint_fault(parsed.resolved, call.client):
            raise refusal(fault, parsed.constraint_param)
        call.record.prompt_tokens = parsed.resolved.prompt_tokens
        if parsed.resolved.cut_to is not None:
            call.record.clamped_fields[parsed.max_tokens_param] = parsed.resolved.cut_to
        resolved = of_tenant(parsed.resolved, call.caller)
        return replace(parsed, resolved=fit(call, resolved, parsed.max_tokens_param))

    async def begin(self, wire: WireFormat, call: Call, parsed: ParsedRequest) -> Response | EventStream:
        """The answer to a new request that was accepted. Raises `RequestError`."""
        request, record = parsed.resolved, call.record
        if parsed.whole is None and self._resume.wanted(call):
            return await self._resume.open(call, parsed, wire)
        running = self._service.start(request)
        headers = {"x-seed": str(request.seed)}
        if parsed.whole is not None:
            content = await _whole(running, request, parsed.whole, record)
            return Response(content, headers=headers, media_type="application/json")
        writer = wire.writer(request, parsed.settings)
        chunks = _events(running, writer, record)
        return await EventStream(chunks, on_error=writer.failed, settings=self._settings, headers=headers).opened()


async def _events(
    running: RunningCompletion, writer: EventWriter, record: RequestRecord
) -> AsyncGenerator[bytes, None]:
    """The events of a completion. Those of one delta are joined into one chunk."""
    started = False
    try:
        async with running, aclosing(running.deltas()) as deltas:
            async for delta in deltas:
                _note(record, delta)
                # Before the delta's events: a writer may number its events, or say in the first what there is so far.
                opened = [] if started else writer.opened()
                gained = partial(writer.gained, delta)
                # The logprobs of a prompt come at once.
                scores = delta.prompt_logprobs
                many = scores is not None and len(scores) * (1 + scores.top) > INLINE_ENTRIES
                events = await asyncio.to_thread(gained) if many else gained()
                yield b"".join([*opened, *events])
                started = True
            yield b"".join(writer.ended(running.usage))
    finally:
        record.cached_prompt_tokens = running.usage.cached_tokens


async def _whole(running: RunningCompletion, request: ResolvedRequest, whole: Whole, record: RequestRecord) -> bytes:
    gained: list[list[Delta]] = [[] for _ in range(request.choices)]
    try:
        async with running, aclosing(running.deltas()) as deltas:
            async for delta in deltas:
                _note(record, delta)
                gained[delta.choice].append(delta)
    finally:
        usage = running.usage
        record.cached_prompt_tokens = usage.cached_tokens
    entries = usage.completion_tokens * (1 + (request.requests[0].sampling.logprobs or 0)) + request.prompt_logprobs
    in_loop = entries <= INLINE_ENTRIES

    def written() -> bytes:
        document = whole(gained, usage)
        if isinstance(document, str):
            return document.encode()
        # A large document is encoded piece by piece, since no other thread runs during a single `encode` call.
        pieces = [_JSON.encode(document)] if in_loop else _JSON.iterencode(document)
        return "".join(pieces).encode()

    return written() if in_loop else await asyncio.to_thread(written)


def _note(record: RequestRecord, delta: Delta) -> None:
    if delta.token_ids:
        record.saw_tokens(len(delta.token_ids))
    if delta.finish_reason is not None:
        record.outcome = delta.finish_reason
