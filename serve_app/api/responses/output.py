"""The output items of a response, built from the parts of an answer, and the events that tell of them.

Promises that items and events depend on the parts alone, and that a token of text costs one formatted line. Knows no
tokens but those whose logprobs it is given.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from serve_app.api.call_ids import call_id
from serve_app.api.http.sse import json_text, one_line
from serve_app.api.responses.ids import output_item_id
from serve_app.chat.parts import ArgumentsPart, CallPart, Part, ReasoningPart, TextPart

Logprob = Mapping[str, Any]
Told = tuple[str, str]
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

    def part(self) -> dict[str, Any]:
        """The content part so far."""
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": self.text}
        return {"type": "output_text", "annotations": [], "logprobs": self.logprobs, "text": self.text}

    def item(self, status: str, *, opening: bool = False) -> dict[str, Any]:
        """The item so far; `opening`: before its first part."""
        if self.kind == "function_call":
            return {
                "id": self.id,
                "type": self.kind,
                "status": status,
                "arguments": self.text,
                "call_id": self.call_id,
                "name": self.name,
            }
        content = [] if opening else [self.part()]
        if self.kind == "reasoning":
            return {"id": self.id, "type": self.kind, "summary": [], "content": content, "status": status}
        return {"id": self.id, "type": self.kind, "status": status, "content": content, "role": "assistant"}


class Output:
    """The items of one response."""

    def __init__(self, response_id: str) -> None:
        self._response_id = response_id
        self._done: list[dict[str, Any]] = []
        self._open: _OpenItem | None = None
        self._unplaced: list[Logprob] = []
        """Logprobs of tokens whose text is not in an item yet."""

    def items(self, open_status: str) -> list[dict[str, Any]]:
        """All items so far; the last one has `open_status` if it is not done."""
        return self._done if self._open is None else [*self._done, self._open.item(open_status)]

    def add(self, parts: Sequence[Part], logprobs: Sequence[Logprob]) -> list[Told]:
        """The events of more parts. Logprobs are those of all tokens of these parts: only those of text are shown."""
        told: list[Told] = []
        self._unplaced += logprobs
        for part in parts:
            match part:
                case TextPart():
                    told += self._text("message", part.text)
                case ReasoningPart():
                    told += self._text("reasoning", part.text)
                case CallPart():
                    told += self._begin("function_call", part.name, call_id(self._response_id, 0, part.number))
                case ArgumentsPart():
                    assert self._open is not None
                    told.append(self._more(self._open, part.text))
        if self._unplaced and (self._open is None or self._open.kind != "message") and parts:
            self._unplaced = []
        return told

    def end(self, status: str) -> list[Told]:
        """The events that close the last item. An answer without any item gets an empty message."""
        told = [] if self._open is not None or self._done else self._begin("message")
        if self._open is not None and self._open.kind == "message":
            self._open.logprobs += self._unplaced
        return [*told, *self._close(status)]

    def _text(self, kind: str, text: str) -> list[Told]:
        told = [] if self._open is not None and self._open.kind == kind else self._begin(kind)
        assert self._open is not None
        told.append(self._more(self._open, text))
        return told

    def _begin(self, kind: str, name: str = "", call: str = "") -> list[Told]:
        told = self._close("completed")
        index = len(self._done)
        self._open = item = _OpenItem(kind, output_item_id(self._response_id, kind, index), index, name, call)
        added = f'"item":{_json(item.item("in_progress", opening=True))},"output_index":{index}'
        told.append(("response.output_item.added", added))
        if kind != "function_call":
            told.append(("response.content_part.added", f'{item.place},"part":{_json(item.part())}'))
        return told

    def _more(self, item: _OpenItem, text: str) -> Told:
        item.texts.append(text)
        logprobs = ""
        if item.kind == "message":
            logprobs = ',"logprobs":[]'
            if self._unplaced:
                item.logprobs += self._unplaced
                logprobs = f',"logprobs":{_json([_without_bytes(each) for each in self._unplaced])}'
                self._unplaced = []
        return _DELTAS[item.kind], f'{item.place},"delta":{json_text(text)}{logprobs}'

    def _close(self, status: str) -> list[Told]:
        item, self._open = self._open, None
        if item is None:
            return []
        made = item.item(status)
        self._done.append(made)
        done: Told = ("response.output_item.done", f'"item":{_json(made)},"output_index":{item.index}')
        if item.kind == "function_call":
            arguments = f'{item.place},"name":{json_text(item.name)},"arguments":{json_text(item.text)}'
            return [("response.function_call_arguments.done", arguments), done]
        text = f'{item.place},"text":{json_text(item.text)}'
        if item.kind == "message":
            text += f',"logprobs":{_json([_without_bytes(each) for each in item.logprobs])}'
        kind = "response.output_text.done" if item.kind == "message" else "response.reasoning_text.done"
        part: Told = ("response.content_part.done", f'{item.place},"part":{_json(item.part())}')
        return [(kind, text), part, done]


def _without_bytes(logprob: Logprob) -> dict[str, Any]:
    """As the events have it; only items have the bytes."""
    top = [{"token": each["token"], "logprob": each["logprob"]} for each in logprob["top_logprobs"]]
    return {"token": logprob["token"], "logprob": logprob["logprob"], "top_logprobs": top}


def _json(value: object) -> str:
    return one_line(json.dumps(value, ensure_ascii=False))
