"""Puts an answer together from the events of each protocol, or from its whole document, and notes what is out of place.

Ids that the service draws for each request (of answers, calls and items) differ from one answer to the next and are
left out. All else is kept to the byte. Knows no connection.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from httpx_sse import ServerSentEvent

from loadtest.outcome import Outcome
from loadtest.verdicts import Answer
from loadtest.workload import Mode, Question, Wire


class _Choice:
    """One choice so far."""

    def __init__(self) -> None:
        self.text = ""
        self.reasoning = ""
        self.calls: list[list[str]] = []
        """Name and arguments of each."""
        self.logprobs: list[Any] = []
        self.reason: str | None = None

    @property
    def said(self) -> tuple[str, str, list[list[str]]]:
        """What the model said in it."""
        return self.text, self.reasoning, self.calls

    def more_arguments(self, number: int, arguments: str) -> None:
        """Of a call that has begun. Raises `ValueError`."""
        if number != len(self.calls) - 1:
            raise ValueError(f"arguments of call {number}, and call {len(self.calls) - 1} is open")
        self.calls[number][1] += arguments


class Reply(ABC):
    """Collects one answer."""

    def __init__(self, question: Question) -> None:
        self._choices = [_Choice() for _ in range(question.choices)]
        self._usage: tuple[int, int] | None = None
        """Tokens of the prompt and of the answer."""
        self._has_logprobs = question.has_logprobs
        self._stream_id = ""
        self.next_index = 0
        """Of events with numbers."""
        self.last_event_id = ""
        self.over = False

    def take(self, event: ServerSentEvent, outcome: Outcome) -> None:
        """One event. Raises `ValueError` when it is an error, and that or `KeyError` when the protocol has no such."""
        document = None if event.data == "[DONE]" else json.loads(event.data)
        if document is not None and (error := self._error(event.event, document)):
            raise ValueError(f"error event: {error.get('code') or error.get('type')}: {error['message']}")
        if self.over:
            outcome.faults.append("an event after the last one")
        if event.id:
            self._number(event.id, outcome)
        if document is None:
            self.over = True
        else:
            self._take(event.event, document, outcome)

    def _error(self, name: str, document: Mapping[str, Any]) -> Mapping[str, Any] | None:
        error: Mapping[str, Any] | None = document.get("error")
        return error

    @abstractmethod
    def _take(self, name: str, document: dict[str, Any], outcome: Outcome) -> None:
        """One event that is no error."""

    def _number(self, event_id: str, outcome: Outcome) -> None:
        """Note an event's id: stream, index, and a digest of the text so far, for the server to read."""
        stream_id, index = event_id.split(":")[:2]
        self._count(stream_id, int(index), 1, outcome)
        self.last_event_id = event_id

    def _count(self, stream_id: str, index: int, first: int, outcome: Outcome) -> None:
        """Note that event `index` came; the first one of a stream has index `first` at most."""
        if self._stream_id not in ("", stream_id):
            outcome.faults.append(f"an event of stream {stream_id} in stream {self._stream_id}")
        if not self._stream_id:
            self._stream_id, self.next_index = stream_id, index
            if index > first:
                outcome.faults.append(f"the first event has index {index}")
        if index != self.next_index:
            outcome.faults.append(f"event {index} where {self.next_index} was due")
            outcome.repeated_events |= index < self.next_index
        self.next_index = index + 1

    def take_whole(self, document: dict[str, Any]) -> None:
        """An answer that was not streamed."""
        raise ValueError("this protocol only streams")

    def answer(self) -> Answer:
        """The finished answer. Raises `ValueError` when it lacks its usage."""
        if self._usage is None:
            raise ValueError("the answer ended without its usage")
        prompt_tokens, completion_tokens = self._usage
        return Answer(
            tuple(choice.text for choice in self._choices),
            tuple(choice.reason for choice in self._choices),
            prompt_tokens,
            completion_tokens,
            self._token_ids(completion_tokens),
            tuple(tuple(choice.logprobs) for choice in self._choices) if self._has_logprobs else None,
            tuple(choice.reasoning for choice in self._choices),
            tuple(tuple((name, arguments) for name, arguments in choice.calls) for choice in self._choices),
        )

    def _token_ids(self, completion_tokens: int) -> tuple[int, ...] | None:
        return None


class NativeReply(Reply):
    """Of /stream, and of gRPC, whose messages have the same fields."""

    def __init__(self, question: Question) -> None:
        super().__init__(question)
        self._ids: list[int] = []

    def _take(self, name: str, document: dict[str, Any], outcome: Outcome) -> None:
        if name == "done":
            usage = document["usage"]
            self.take_done(document["finish_reason"], usage["prompt_tokens"], usage["completion_tokens"])
        else:
            self.take_token(document["token_id"], document["generated_text"])

    def take_token(self, token_id: int, text: str) -> None:
        """One token's text."""
        self._ids.append(token_id)
        self._choices[0].text += text

    def take_done(self, finish_reason: str, prompt_tokens: int, completion_tokens: int) -> None:
        """The end."""
        self._choices[0].reason, self._usage, self.over = finish_reason, (prompt_tokens, completion_tokens), True

    def number(self, event_id: str, outcome: Outcome) -> None:
        """Note the id of a message with content."""
        self._number(event_id, outcome)

    def _token_ids(self, completion_tokens: int) -> tuple[int, ...]:
        """Text that became certain only as the answer ended comes in one more document, which repeats the last id."""
        ids = self._ids
        extra = len(ids) == completion_tokens + 1 and ids[-1:] == ids[-2:-1]
        return tuple(ids[:completion_tokens] if extra else ids)


class ChatReply(Reply):
    """Of /v1/chat/completions."""

    def _take(self, name: str, document: dict[str, Any], outcome: Outcome) -> None:
        if document.get("usage"):
            self._take_usage(document["usage"])
        for entry in document["choices"]:
            choice = self._choices[entry["index"]]
            delta = entry["delta"]
            choice.text += delta.get("content") or ""
            choice.reasoning += delta.get("reasoning_content") or ""
            for call in delta.get("tool_calls") or ():
                function = call["function"]
                if "id" in call:
                    if call["index"] != len(choice.calls):
                        outcome.faults.append(f"call {call['index']} began where {len(choice.calls)} was due")
                    choice.calls.append([function["name"], ""])
                choice.more_arguments(call["index"], function["arguments"])
            self._take_end(choice, entry)

    def _take_end(self, choice: _Choice, entry: Mapping[str, Any]) -> None:
        choice.reason = entry["finish_reason"] or choice.reason
        if entry["logprobs"]:
            choice.logprobs += [_entry(token) for token in entry["logprobs"]["content"]]

    def _take_usage(self, usage: Mapping[str, int]) -> None:
        self._usage = usage["prompt_tokens"], usage["completion_tokens"]

    def take_whole(self, document: dict[str, Any]) -> None:
        """See `Reply`."""
        for entry in document["choices"]:
            choice, message = self._choices[entry["index"]], entry["message"]
            choice.text = message["content"] or ""
            choice.reasoning = message.get("reasoning_content") or ""
            functions = [call["function"] for call in message.get("tool_calls") or ()]
            choice.calls = [[function["name"], function["arguments"]] for function in functions]
            self._take_end(choice, entry)
        self._take_usage(document["usage"])
        self.over = True


class MessagesReply(Reply):
    """Of /v1/messages."""

    def __init__(self, question: Question) -> None:
        super().__init__(question)
        self._blocks = 0
        self._open = ""
        """The type of the open block; "": none is open."""
        self._prompt_tokens = 0

    def _take(self, name: str, document: dict[str, Any], outcome: Outcome) -> None:
        if document["type"] != name:
            outcome.faults.append(f"the event {name} has the type {document['type']}")
        choice = self._choices[0]
        match name:
            case "message_start":
                self._prompt_tokens = document["message"]["usage"]["input_tokens"]
            case "content_block_start":
                if self._open or document["index"] != self._blocks:
                    outcome.faults.append(f"block {document['index']} began where {self._blocks} was due")
                self._open = document["content_block"]["type"]
                self._begin(document["content_block"])
            case "content_block_delta":
                self._more(choice, document["delta"])
            case "content_block_stop":
                self._open, self._blocks = "", self._blocks + 1
            case "message_delta":
                choice.reason = document["delta"]["stop_reason"]
                self._take_usage(document["usage"])
            case "message_stop":
                self.over = True
            case _:
                raise ValueError(f"no event of this protocol: {name}")

    def _begin(self, block: Mapping[str, Any]) -> None:
        if block["type"] == "tool_use":
            self._choices[0].calls.append([block["name"], ""])

    def _more(self, choice: _Choice, delta: Mapping[str, Any]) -> None:
        match self._open, delta["type"]:
            case "text", "text_delta":
                choice.text += delta["text"]
            case "thinking", "thinking_delta":
                choice.reasoning += delta["thinking"]
            case "thinking", "signature_delta":
                pass
            case "tool_use", "input_json_delta":
                choice.more_arguments(len(choice.calls) - 1, delta["partial_json"])
            case block, kind:
                raise ValueError(f"a {kind} in a block of the type {block or 'none'}")

    def _take_usage(self, usage: Mapping[str, int]) -> None:
        """Which of the prompt's tokens were cached differs from run to run; their sum does not."""
        prompt = usage["input_tokens"] + usage["cache_read_input_tokens"]
        self._usage = prompt, usage["output_tokens"]

    def take_whole(self, document: dict[str, Any]) -> None:
        """See `Reply`."""
        choice = self._choices[0]
        for block in document["content"]:
            match block["type"]:
                case "text":
                    choice.text += block["text"]
                case "thinking":
                    choice.reasoning += block["thinking"]
                case kind:  # a whole answer has arguments as JSON and not as the text that they came in
                    raise ValueError(f"a block of the type {kind}, which is only compared in streams")
        choice.reason = document["stop_reason"]
        self._take_usage(document["usage"])
        self.over = True


class ResponsesReply(Reply):
    """Of /v1/responses. Its last event has the whole answer too: both must be the same."""

    def _error(self, name: str, document: Mapping[str, Any]) -> Mapping[str, Any] | None:
        if name == "error":
            return document
        return document["response"].get("error") if name == "response.failed" else None

    def _take(self, name: str, document: dict[str, Any], outcome: Outcome) -> None:
        if document["type"] != name:
            outcome.faults.append(f"the event {name} has the type {document['type']}")
        self._count("response", document["sequence_number"], 0, outcome)
        self.last_event_id = str(document["sequence_number"])
        if name == "response.created" and outcome.visit.mode is Mode.RESUME:
            outcome.stream_id = document["response"]["id"].removeprefix("resp_")
        choice = self._choices[0]
        match name:
            case "response.output_text.delta":
                choice.text += document["delta"]
            case "response.reasoning_text.delta":
                choice.reasoning += document["delta"]
            case "response.function_call_arguments.delta":
                choice.more_arguments(len(choice.calls) - 1, document["delta"])
            case "response.output_item.added" if document["item"]["type"] == "function_call":
                choice.calls.append([document["item"]["name"], ""])
            case "response.completed" | "response.incomplete":
                streamed, choice = choice, _Choice()
                self._choices[0] = choice
                self.take_whole(document["response"])
                if streamed.said != choice.said:
                    outcome.faults.append(f"the events said {streamed.said}, the whole response says {choice.said}")

    def take_whole(self, document: dict[str, Any]) -> None:
        """See `Reply`."""
        choice = self._choices[0]
        for item in document["output"]:
            match item["type"]:
                case "message":
                    for part in item["content"]:
                        choice.text += part["text"]
                        choice.logprobs += [_entry(token) for token in part["logprobs"]]
                case "reasoning":
                    choice.reasoning += "".join(part["text"] for part in item["content"])
                case "function_call":
                    choice.calls.append([item["name"], item["arguments"]])
                case kind:
                    raise ValueError(f"no item of an answer: {kind}")
        choice.reason = document["status"]
        self._usage = document["usage"]["input_tokens"], document["usage"]["output_tokens"]
        self.over = True


_REPLIES: Mapping[Wire, type[Reply]] = {
    Wire.NATIVE: NativeReply,
    Wire.GRPC: NativeReply,
    Wire.CHAT: ChatReply,
    Wire.MESSAGES: MessagesReply,
    Wire.RESPONSES: ResponsesReply,
}


def new_reply(question: Question) -> Reply:
    """For one answer to the question, before its first event."""
    return _REPLIES[question.wire](question)


def _entry(token: Mapping[str, Any]) -> Any:
    return token["token"], token["logprob"], tuple((top["token"], top["logprob"]) for top in token["top_logprobs"])
