"""The events of a streamed answer in Anthropic's format.

    message_start
    content_block_start, content_block_delta ..., content_block_stop      for each block
    message_delta (why it stopped, usage), message_stop

Promises the same blocks as a whole answer. Source: docs.claude.com/en/docs/build-with-claude/streaming.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from serve_app.api.anthropic.documents import (
    CALL_PREFIX,
    opened_message,
    signature,
    stop_document,
    usage_document,
)
from serve_app.api.anthropic.errors import error_document
from serve_app.api.call_ids import call_id
from serve_app.api.errors import api_error
from serve_app.api.http.sse import json_text, one_line
from serve_app.chat.parts import ArgumentsPart, CallPart, Part, ReasoningPart, TextPart
from serve_app.core import RequestError
from serve_app.generation.completion import Usage
from serve_app.generation.events import EventWriter
from serve_app.generation.request import ResolvedRequest
from serve_app.generation.text import Delta


def _event(name: str, fields: str) -> bytes:
    """One event. `fields`: JSON of the fields after the type, which is the event's name."""
    comma = ", " if fields else ""
    return f'event: {name}\ndata: {{"type": "{name}"{comma}{fields}}}\n\n'.encode()


class MessageWriter(EventWriter):
    """Writes one answer. The open block is known by the kind of its parts, and by its call's number."""

    def __init__(self, request: ResolvedRequest, settings: Mapping[str, Any]) -> None:
        """`settings` are those of `MessagesFormat`."""
        self._request = request
        self._answer_id: str = settings["id"]
        self._omits_thinking: bool = settings["omit_thinking"]
        self._index = -1
        """Of the block that is open, or was last."""
        self._open: tuple[type[Part], int] | None = None
        self._thought = sha256()
        """Of the thinking in the open block."""
        self._stop: dict[str, Any] = {}

    def opened(self) -> list[bytes]:
        """`message_start`. Cached tokens are not known yet; the usage at the end tells them."""
        message = opened_message(self._answer_id, self._request.model)
        usage = usage_document(Usage(self._request.prompt_tokens, 0, 0))
        message["usage"] = {**usage, "service_tier": "standard"}
        return [_event("message_start", f'"message": {one_line(json.dumps(message, ensure_ascii=False))}')]

    def gained(self, delta: Delta) -> list[bytes]:
        """The events that carry `delta`; none if it adds nothing to the answer yet."""
        events: list[bytes] = []
        for part in delta.parts:
            if isinstance(part, ArgumentsPart):
                events.append(self._piece(f'"input_json_delta", "partial_json": {json_text(part.text)}'))
                continue
            kind = (type(part), part.number if isinstance(part, CallPart) else 0)
            if self._open != kind:
                events += self._close()
                events.append(self._begin(part))
                self._open = kind
            if isinstance(part, TextPart):
                events.append(self._piece(f'"text_delta", "text": {json_text(part.text)}'))
            elif isinstance(part, ReasoningPart):
                self._thought.update(part.text.encode())
                if not self._omits_thinking:
                    events.append(self._piece(f'"thinking_delta", "thinking": {json_text(part.text)}'))
        if delta.finish_reason is not None:
            events += self._close()
            self._stop = stop_document(delta, self._request)
        return events

    def ended(self, usage: Usage) -> list[bytes]:
        """`message_delta` and `message_stop`."""
        delta = json.dumps({**self._stop, "stop_details": None, "container": None}, ensure_ascii=False)
        counted = json.dumps(usage_document(usage))
        return [
            _event("message_delta", f'"delta": {one_line(delta)}, "usage": {counted}'),
            _event("message_stop", ""),
        ]

    def failed(self, error: RequestError) -> bytes:
        """The `error` event, which ends the stream."""
        document = error_document(api_error(error), self._request.request_id)
        return f"event: error\ndata: {json.dumps(document)}\n\n".encode()

    def _begin(self, part: Part) -> bytes:
        self._index += 1
        match part:
            case CallPart():
                made = call_id(self._answer_id, 0, part.number, CALL_PREFIX)
                block = f'"tool_use", "id": "{made}", "name": {json_text(part.name)}, "input": {{}}'
            case ReasoningPart():
                self._thought = sha256()
                block = '"thinking", "thinking": "", "signature": ""'
            case _:
                block = '"text", "text": ""'
        return _event("content_block_start", f'"index": {self._index}, "content_block": {{"type": {block}}}')

    def _piece(self, content: str) -> bytes:
        return _event("content_block_delta", f'"index": {self._index}, "delta": {{"type": {content}}}')

    def _close(self) -> list[bytes]:
        """End the open block, if there is one."""
        if self._open is None:
            return []
        kind, _ = self._open
        self._open = None
        events = [_event("content_block_stop", f'"index": {self._index}')]
        if kind is ReasoningPart:
            signed = signature(self._thought.digest())
            events.insert(0, self._piece(f'"signature_delta", "signature": "{signed}"'))
        return events
