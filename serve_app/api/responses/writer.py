"""Writes a response: as one document at any moment, and as OpenAI's typed events.

Promises that both depend on the request's settings and on the tokens alone, so that any ingress writes the same. Event
number k has the `sequence_number` k. Knows no store.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from serve_app.api.http.sse import json_line, json_text
from serve_app.api.openai.extras import finite
from serve_app.api.responses.output import Logprob, Output, UnnumberedEvent
from serve_app.chat.token_texts import TokenTexts
from serve_app.core import FailureCode, FinishReason, RequestError
from serve_app.generation.completion import Usage
from serve_app.generation.events import EventWriter
from serve_app.generation.text import Delta, TokenLogprob

_ERRORS: Mapping[str, str] = {
    FailureCode.OVERLOADED: "rate_limit_exceeded",
    FailureCode.INVALID_REQUEST: "invalid_prompt",
    FailureCode.CONTEXT_LENGTH_EXCEEDED: "invalid_prompt",
}
"""Why a response failed -> OpenAI's code. Any other reason is `server_error`."""


class ResponseWriter(EventWriter):
    """One response on its way."""

    def __init__(self, settings: Mapping[str, Any], tokens: TokenTexts) -> None:
        """`settings`: those of the `ParsedRequest`. `response` is the document without what comes with the answer."""
        self._envelope: dict[str, Any] = settings["response"]
        self._tokens = tokens
        self._output = Output(self._envelope["id"])
        self._number = 0
        self._queued = bool(self._envelope["background"])
        """No token has come yet, and the response waits in the background."""
        self._finish_reason: FinishReason | None = None
        self._usage: Usage | None = None

    def opened(self) -> list[bytes]:
        """`response.created`, and that it is in progress or in the queue."""
        document = f'"response":{self.document()}'
        state = "response.queued" if self._queued else "response.in_progress"
        return self._numbered([("response.created", document), (state, document)])

    def gained(self, delta: Delta) -> list[bytes]:
        """The events of what is new in the output, and of items that are done."""
        events: list[UnnumberedEvent] = []
        if self._queued and (delta.token_ids or delta.finish_reason is not None):
            self._queued = False
            events.append(("response.in_progress", f'"response":{self.document()}'))
        return self._numbered(events + self._taken(delta))

    def ended(self, usage: Usage) -> list[bytes]:
        """The whole response."""
        self._usage = usage
        return self._numbered([(f"response.{self.status()}", f'"response":{self.document()}')])

    def failed(self, error: RequestError) -> bytes:
        """The response as far as it came. OpenAI has no event for a cancelled one: its status says so."""
        kind = "response.incomplete" if self.status(error) == "cancelled" else "response.failed"
        return self._numbered([(kind, f'"response":{self.document(error)}')])[0]

    def add(self, delta: Delta, usage: Usage) -> None:
        """Take in what is new without writing it."""
        if delta.token_ids or delta.finish_reason is not None:
            self._queued = False
        self._taken(delta)
        self._usage = usage

    def document(self, error: RequestError | None = None, *, going_on: bool = True) -> str:
        """The response as it is now, as JSON. See `status`.

        Its output is JSON already, which may be megabytes of logprobs.
        """
        fields = self._fields(error, going_on=going_on)
        names = list(fields)
        at = names.index("output")
        before, after = ({name: fields[name] for name in some} for some in (names[:at], names[at + 1 :]))
        return f'{json_line(before)[:-1]}, "output": {self.output(error, going_on=going_on)}, {json_line(after)[1:]}'

    @property
    def complete(self) -> bool:
        """The model has ended the response, or its limit has."""
        return self._finish_reason is not None

    def output(self, error: RequestError | None = None, *, going_on: bool = True) -> str:
        """The output items of the `document`, as a list in JSON."""
        in_progress = self.status(error, going_on=going_on) == "in_progress"
        return self._output.items("in_progress" if in_progress else "incomplete")

    def status(self, error: RequestError | None = None, *, going_on: bool = True) -> str:
        """The `status` of the response. `error`: what ended it. `going_on`: somebody generates it, if it has not
        ended."""
        if error is not None:
            return "cancelled" if error.code == FailureCode.CANCELLED else "failed"
        if self.complete:
            return "incomplete" if self._finish_reason is FinishReason.LENGTH else "completed"
        if self._queued:
            return "queued"
        return "in_progress" if going_on else "incomplete"

    def _taken(self, delta: Delta) -> list[UnnumberedEvent]:
        """Take in what is new in the output; the events of it."""
        events = self._output.add(delta.parts, [self._logprob(each) for each in delta.logprobs or ()])
        if delta.finish_reason is not None:
            self._finish_reason = delta.finish_reason
            events += self._output.end("incomplete" if delta.finish_reason is FinishReason.LENGTH else "completed")
        return events

    def _fields(self, error: RequestError | None, *, going_on: bool) -> dict[str, Any]:
        """The fields of the `document`, with any value for the output."""
        status = self.status(error, going_on=going_on)
        incomplete = {"reason": "max_output_tokens"} if self._finish_reason is FinishReason.LENGTH else None
        cause = None
        if status == "failed" and error is not None:
            cause = {"code": _ERRORS.get(error.code or "", "server_error"), "message": error.message}
        return {
            **self._envelope,
            "status": status,
            "error": cause,
            "incomplete_details": incomplete,
            "usage": usage_document(self._usage) if self.complete and self._usage is not None else None,
        }

    def _logprob(self, token: TokenLogprob) -> Logprob:
        own, own_short = self._token(token.token_id, token.logprobs.logprob)
        top = [self._token(*other) for other in token.logprobs.top]
        of_item = ", ".join([f"{{{full}}}" for full, _ in top])
        of_event = ", ".join([f"{{{short}}}" for _, short in top])
        return Logprob(f'{{{own}, "top_logprobs": [{of_item}]}}', f'{{{own_short}, "top_logprobs": [{of_event}]}}')

    def _token(self, token_id: int, logprob: float) -> tuple[str, str]:
        """The JSON of a token's fields, with and without its bytes."""
        text = json_text(self._tokens.text(token_id))
        content = [*(self._tokens.utf8(token_id) or b"")]
        number = f"{finite(logprob)!r}"
        return f'"token": {text}, "bytes": {content}, "logprob": {number}', f'"token": {text}, "logprob": {number}'

    def _numbered(self, events: Sequence[UnnumberedEvent]) -> list[bytes]:
        written = []
        for kind, rest in events:
            text = f'event: {kind}\ndata: {{"type":"{kind}",{rest},"sequence_number":{self._number}}}\n\n'
            written.append(text.encode())
            self._number += 1
        return written


def usage_document(usage: Usage) -> dict[str, Any]:
    """`usage` as a response has it."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cache_write_tokens": 0, "cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def error_event(error: RequestError, number: int) -> bytes:
    """The event of an error that concerns this reader of a response, and not the response."""
    details = {"type": "error", "code": error.code, "message": error.message, "param": error.param}
    return f"event: error\ndata: {json_line({**details, 'sequence_number': number})}\n\n".encode()
