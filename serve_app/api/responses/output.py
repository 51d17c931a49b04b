"""The output items of a response, built from the parts of an answer, and the events that tell of them.

Promises that items and events depend on the parts alone, that a token of text costs one formatted line, and that a
logprob is written as JSON once: the events at the end of an item repeat all of its logprobs several times. Knows no
tokens but those whose logprobs it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from serve_app.api.call_ids import call_id
from serve_app.api.http.sse import json_line, json_text
from serve_app.api.responses.ids import output_item_id
from serve_app.chat.parts import ArgumentsPart, CallPart, Part, ReasoningPart, TextPart


class Logprob(NamedTuple):
    """The logprob of one token, and of the likeliest tokens in its place, as JSON."""

    of_item: str
    of_event: str
    """The same without the tokens' bytes, which only items have."""


UnnumberedEvent = tuple[str, str]
"""An event without its number: (type, the rest of its JSON object)."""

_DELTAS = {
    "message": "response.output_text.delta",
    "reasoning": "response.reasoning_text.delta",
    "function_call": "response.function_call_arguments.delta",
}


@dataclass(eq=False)
class _OpenItem:
    """The item that the answer is at."""

    kind: str
    id: str
    index: int
    name: str = ""
    call_id: str = ""
    texts: list[str] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def place(self) -> str:
        """The JSON of the fields by which an event names a content part, or the item of a call."""
        content = "" if self.kind == "function_call" else '"content_index":0,'
        return f'{content}"item_id":"{self.id}","output_index":{self.index}'

    def part(self) -> str:
        """The JSON of the content part so far."""
        text = json_text(self.text)
        if self.kind == "reasoning":
            return f'{{"type": "reasoning_text", "text": {text}}}'
        logprobs = ", ".join([each.of_item for each in self.logprobs])
        return f'{{"type": "output_text", "annotations": [], "logprobs": [{logprobs}], "text": {text}}}'

    def item(self, status: str, *, opening: bool = False) -> str:
        """The JSON of the item so far; `opening`: before its first part."""
        named = f'"id": "{self.id}", "type": "{self.kind}"'
        if self.kind == "function_call":
            call = json_line({"arguments": self.text, "call_id": self.call_id, "name": self.name})
            return f'{{{named}, "status": "{status}", {call[1:]}'
        content = "" if opening else self.part()
        if self.kind == "reasoning":
            return f'{{{named}, "summary": [], "content": [{content}], "status": "{status}"}}'
        return f'{{{named}, "status": "{status}", "content": [{content}], "role": "assistant"}}'


class Output:
    """The items of one response."""

    def __init__(self, response_id: str) -> None:
        self._response_id = response_id
        self._done: list[str] = []
        """The JSON of the items that are done."""
        self._open: _OpenItem | None = None
        self._unplaced: list[Logprob] = []
        """Logprobs of tokens whose text is not in an item yet."""

    def items(self, open_status: str) -> str:
        """All items so far as a list in JSON; the last one has `open_status` if it is not done."""
        items = self._done if self._open is None else [*self._done, self._open.item(open_status)]
        return f"[{', '.join(items)}]"

    def add(self, parts: Sequence[Part], logprobs: Sequence[Logprob]) -> list[UnnumberedEvent]:
        """The events of more parts. Logprobs are those of all tokens of these parts: only those of text are shown."""
        events: list[UnnumberedEvent] = []
        self._unplaced += logprobs
        for part in parts:
            match part:
                case TextPart():
                    events += self._text("message", part.text)
                case ReasoningPart():
                    events += self._text("reasoning", part.text)
                case CallPart():
                    events += self._begin("function_call", part.name, call_id(self._response_id, 0, part.number))
                case ArgumentsPart():
                    assert self._open is not None
                    events.append(self._more(self._open, part.text))
        if self._unplaced and (self._open is None or self._open.kind != "message") and parts:
            self._unplaced = []
        return events

    def end(self, status: str) -> list[UnnumberedEvent]:
        """The events that close the last item. An answer without any item gets an empty message."""
        events = [] if self._open is not None or self._done else self._begin("message")
        if self._open is not None and self._open.kind == "message":
            self._open.logprobs += self._unplaced
        return [*events, *self._close(status)]

    def _text(self, kind: str, text: str) -> list[UnnumberedEvent]:
        events = [] if self._open is not None and self._open.kind == kind else self._begin(kind)
        assert self._open is not None
        events.append(self._more(self._open, text))
        return events

    def _begin(self, kind: str, name: str = "", call: str = "") -> list[UnnumberedEvent]:
        events = self._close("completed")
        index = len(self._done)
        self._open = item = _OpenItem(kind, output_item_id(self._response_id, kind, index), index, name, call)
        added = f'"item":{item.item("in_progress", opening=True)},"output_index":{index}'
        events.append(("response.output_item.added", added))
        if kind != "function_call":
            events.append(("response.content_part.added", f'{item.place},"part":{item.part()}'))
        return events

    def _more(self, item: _OpenItem, text: str) -> UnnumberedEvent:
        item.texts.append(text)
        logprobs = ""
        if item.kind == "message":
            logprobs = f',"logprobs":{_of_events(self._unplaced)}'
            item.logprobs += self._unplaced
            self._unplaced = []
        return _DELTAS[item.kind], f'{item.place},"delta":{json_text(text)}{logprobs}'

    def _close(self, status: str) -> list[UnnumberedEvent]:
        item, self._open = self._open, None
        if item is None:
            return []
        made = item.item(status)
        self._done.append(made)
        done: UnnumberedEvent = ("response.output_item.done", f'"item":{made},"output_index":{item.index}')
        if item.kind == "function_call":
            arguments = f'{item.place},"name":{json_text(item.name)},"arguments":{json_text(item.text)}'
            return [("response.function_call_arguments.done", arguments), done]
        text = f'{item.place},"text":{json_text(item.text)}'
        if item.kind == "message":
            text += f',"logprobs":{_of_events(item.logprobs)}'
        kind = "response.output_text.done" if item.kind == "message" else "response.reasoning_text.done"
        part: UnnumberedEvent = ("response.content_part.done", f'{item.place},"part":{item.part()}')
        return [(kind, text), part, done]


def _of_events(logprobs: Sequence[Logprob]) -> str:
    """A list in JSON."""
    return f"[{', '.join([each.of_event for each in logprobs])}]"
