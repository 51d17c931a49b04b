"""Each protocol of the API as an adapter: how it asks a question that all have in common, and what its answer says.

An answer is a set of facts: name -> value, for a fact of each choice a list. Two answers agree when every fact that
both have is equal. So a protocol gives the facts that it can tell, and no others.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from google.protobuf.json_format import MessageToDict
from pydantic_core import from_json

from serve_app.api.responses.ids import stream_id_of
from serve_app.proto.serve_app_pb2 import Message, ModelOutputDocument, PromptDocument

Json = dict[str, Any]
Facts = dict[str, Any]

RESUME = {"x-stream-resume": "1"}
PARAMETERS: Json = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
}
TOOLS = {"get_weather": "The weather of a city.", "get_time": "Its time."}
"""Name -> description of the tools that a question offers."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked, in the words of no protocol."""

    prompt: str = ""
    """Raw text to be continued; empty: a chat."""
    messages: tuple[tuple[str, str], ...] = ()
    """(role, text)."""
    max_tokens: int
    seed: int
    sampling: Mapping[str, float] = field(default_factory=dict)
    """Fields that have one name everywhere."""
    stop: tuple[str, ...] = ()
    n: int = 1
    min_tokens: int = 0
    logprobs: int | None = None
    """How many alternatives are listed with each token; None: no logprobs."""
    tool_choice: str | None = None
    """None: no tools. Else auto, none, required or the name of a tool."""
    parallel: bool = True
    schema: Json | None = None
    """JSON schema of the answer's text."""
    plain: bool = True
    """The model knows no reasoning, so an answer without tools has no parts."""

    @property
    def drawing(self) -> Json:
        """The seed and the fields that have one name everywhere."""
        return {"seed": self.seed, **self.sampling}

    @property
    def chat(self) -> list[Json]:
        """The messages as most protocols have them."""
        return [{"role": role, "content": text} for role, text in self.messages]

    @property
    def unread(self) -> bool:
        """The answer's text is all there is: nothing is read out of it."""
        return self.plain and self.tool_choice is None


class Event(NamedTuple):
    """An event of a stream: its id, if the stream can be resumed, its name, and its data."""

    id: str
    name: str
    data: bytes


class Protocol(ABC):
    """One protocol."""

    name: ClassVar[str]
    path: ClassVar[str]
    has_whole: ClassVar[bool] = True
    """Whether an answer may come as one document."""

    def __str__(self) -> str:
        return self.name

    @abstractmethod
    def can_ask(self, question: Question) -> bool:
        """Whether it has a field for all of the question."""

    @abstractmethod
    def body(self, question: Question) -> Json:
        """The body of a request for one document."""

    def streaming_body(self, question: Question) -> Json:
        """The body of a request for a stream."""
        return {**self.body(question), "stream": True}

    def stream_request(self, question: Question, *, resumable: bool) -> tuple[Json, dict[str, str]]:
        """The body and the headers of a request for a stream."""
        return self.streaming_body(question), RESUME if resumable else {}

    def stream_id(self, seen: Sequence[Event]) -> str:
        """The id under which the store has the stream that began with these events."""
        return seen[0].id.partition(":")[0]

    def continuation(self, seen: Sequence[Event]) -> tuple[str, dict[str, str]]:
        """The path and the headers of a GET for the events after these."""
        return f"/v1/streams/{self.stream_id(seen)}", {"last-event-id": seen[-1].id}

    def document_path(self, seen: Sequence[Event]) -> str | None:
        """Where the answer of a stream can be read as one document, after its end."""
        return None

    @abstractmethod
    def of_document(self, document: Json, question: Question) -> Facts:
        """What one document says."""

    @abstractmethod
    def of_events(self, events: Sequence[Event], question: Question) -> Facts:
        """What all events of a stream say."""


class Chat(Protocol):
    """OpenAI's chat."""

    name = "chat"
    path = "/v1/chat/completions"

    def can_ask(self, question: Question) -> bool:
        return bool(question.messages)

    def body(self, question: Question) -> Json:
        body: Json = {"messages": question.chat, "max_tokens": question.max_tokens, **question.drawing}
        body |= {"n": question.n, "stop": list(question.stop), "min_tokens": question.min_tokens}
        if question.logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": question.logprobs}
        if question.schema is not None:
            named = {"name": "answer", "schema": question.schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": named}
        if question.tool_choice is not None:
            body["tools"] = [
                {"type": "function", "function": {"name": name, "description": told, "parameters": PARAMETERS}}
                for name, told in TOOLS.items()
            ]
            body["parallel_tool_calls"] = question.parallel
            named = {"type": "function", "function": {"name": question.tool_choice}}
            body["tool_choice"] = named if question.tool_choice in TOOLS else question.tool_choice
        return body

    def streaming_body(self, question: Question) -> Json:
        return {**super().streaming_body(question), "stream_options": {"include_usage": True}}

    def of_document(self, document: Json, question: Question) -> Facts:
        choices = sorted(document["choices"], key=lambda choice: choice["index"])
        messages = [choice["message"] for choice in choices]
        functions = [[call["function"] for call in message.get("tool_calls") or []] for message in messages]
        text = [message["content"] or "" for message in messages]
        logprobs = [_chat_logprobs(choice["logprobs"]) for choice in choices]
        return {
            "text": text,
            "reasoning": [message.get("reasoning_content", "") for message in messages],
            "calls": [[(each["name"], arguments(each["arguments"])) for each in made] for made in functions],
            "arguments as text": [[each["arguments"] for each in made] for made in functions],
            "logprobs": logprobs,
            **({"raw text": text, "logprobs of text": logprobs} if question.unread else {}),
            **_endings([choice["finish_reason"] for choice in choices]),
            **openai_usage(document["usage"]),
        }

    def of_events(self, events: Sequence[Event], question: Question) -> Facts:
        return self.of_document(_joined_chunks(events, self._join), question)

    def _join(self, choice: Json, chunk: Json) -> None:
        """Add to a choice what a chunk brings, as OpenAI's clients do."""
        message = choice.setdefault("message", {"content": None, "tool_calls": []})
        delta = chunk["delta"]
        for name in ("content", "reasoning_content"):
            if delta.get(name) is not None:
                message[name] = (message.get(name) or "") + delta[name]
        for call in delta.get("tool_calls", ()):
            calls = message["tool_calls"]
            if call["index"] == len(calls):
                calls.append({"id": call["id"], "function": {"name": call["function"]["name"], "arguments": ""}})
            calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        if chunk["logprobs"] is not None:
            known = choice["logprobs"] or {"content": []}
            choice["logprobs"] = {"content": known["content"] + chunk["logprobs"]["content"]}


class UnreadChat(Chat):
    """OpenAI's chat where the reasoning stays in the content: as the protocols that know no parts have it."""

    name = "chat, unread"

    def can_ask(self, question: Question) -> bool:
        can_ask = super().can_ask(question)
        return can_ask and question.tool_choice is None and question.schema is None and not question.plain

    def body(self, question: Question) -> Json:
        return {**super().body(question), "separate_reasoning": False}

    def of_document(self, document: Json, question: Question) -> Facts:
        facts = super().of_document(document, question)
        told = {"raw text": facts.pop("text"), "logprobs of text": facts["logprobs"]}
        return told | {name: facts[name] for name in ("logprobs", "finish", "cut", *COUNTED)}


class Completions(Protocol):
    """OpenAI's completions."""

    name = "completions"
    path = "/v1/completions"

    def can_ask(self, question: Question) -> bool:
        return bool(question.prompt)

    def body(self, question: Question) -> Json:
        body: Json = {"prompt": question.prompt, "max_tokens": question.max_tokens, **question.drawing}
        body |= {"n": question.n, "stop": list(question.stop), "min_tokens": question.min_tokens}
        return body if question.logprobs is None else {**body, "logprobs": question.logprobs}

    def streaming_body(self, question: Question) -> Json:
        return {**super().streaming_body(question), "stream_options": {"include_usage": True}}

    def of_document(self, document: Json, question: Question) -> Facts:
        choices = sorted(document["choices"], key=lambda choice: choice["index"])
        return {
            "raw text": [choice["text"] for choice in choices],
            "lists of logprobs": [_without_empty(choice["logprobs"]) for choice in choices],
            **_endings([choice["finish_reason"] for choice in choices]),
            **openai_usage(document["usage"]),
        }

    def of_events(self, events: Sequence[Event], question: Question) -> Facts:
        return self.of_document(_joined_chunks(events, self._join), question)

    def _join(self, choice: Json, chunk: Json) -> None:
        choice["text"] = choice.get("text", "") + chunk["text"]
        if chunk["logprobs"] is not None:
            known = choice["logprobs"] or {name: [] for name in chunk["logprobs"]}
            choice["logprobs"] = {name: known[name] + more for name, more in chunk["logprobs"].items()}


class Messages(Protocol):
    """Anthropic's messages."""

    name = "messages"
    path = "/v1/messages"
    _ENDINGS: ClassVar = {
        "end_turn": "stop",
        "stop_sequence": "stop",
        "max_tokens": "length",
        "model_context_window_exceeded": "length",
        "tool_use": "tool_calls",
    }

    def can_ask(self, question: Question) -> bool:
        alone = question.n == 1 and not question.min_tokens and question.logprobs is None
        return bool(question.messages) and alone and question.sampling.get("temperature", 0) <= 1

    def body(self, question: Question) -> Json:
        body: Json = {"max_tokens": question.max_tokens, **question.drawing, "stop_sequences": list(question.stop)}
        body["messages"] = [message for message in question.chat if message["role"] != "system"]
        if system := [text for role, text in question.messages if role == "system"]:
            body["system"] = system[0]
        if question.schema is not None:
            body["output_config"] = {"format": {"type": "json_schema", "schema": question.schema}}
        if question.tool_choice is not None:
            body["tools"] = [
                {"name": name, "description": told, "input_schema": PARAMETERS} for name, told in TOOLS.items()
            ]
            kind = {"auto": "auto", "none": "none", "required": "any"}.get(question.tool_choice, "tool")
            body["tool_choice"] = {"type": kind, "disable_parallel_tool_use": not question.parallel}
            if kind == "tool":
                body["tool_choice"]["name"] = question.tool_choice
        return body

    def of_document(self, document: Json, question: Question) -> Facts:
        blocks, usage = document["content"], document["usage"]
        text = _all_of(blocks, "text")
        return {
            "text": [text],
            "reasoning": [_all_of(blocks, "thinking")],
            "calls": [[(each["name"], each["input"]) for each in blocks if each["type"] == "tool_use"]],
            "blocks": [_merged((each["type"], each.get(_SHOWN[each["type"]])) for each in blocks)],
            **({"raw text": [text]} if question.unread else {}),
            **_endings([self._ENDINGS[document["stop_reason"]]]),
            "stop string": [document["stop_sequence"]],
            "prompt tokens": usage["input_tokens"] + usage["cache_read_input_tokens"],
            "cached tokens": usage["cache_read_input_tokens"],
            "completion tokens": usage["output_tokens"],
            "reasoning tokens": usage["output_tokens_details"]["thinking_tokens"],
        }

    def of_events(self, events: Sequence[Event], question: Question) -> Facts:
        document: Json = {}
        pieces: list[str] = []
        written: list[str] = []
        for event in events:
            data = json.loads(event.data)
            assert data["type"] == event.name
            match event.name:
                case "message_start":
                    document = data["message"]
                case "content_block_start":
                    assert data["index"] == len(document["content"])
                    document["content"].append(data["content_block"])
                    pieces = []
                case "content_block_delta":
                    block, delta = document["content"][data["index"]], data["delta"]
                    match delta["type"]:
                        case "input_json_delta":
                            pieces.append(delta["partial_json"])
                        case "text_delta":
                            block["text"] += delta["text"]
                        case "thinking_delta":
                            block["thinking"] += delta["thinking"]
                        case "signature_delta":
                            block["signature"] = delta["signature"]
                case "content_block_stop":
                    if (block := document["content"][data["index"]])["type"] == "tool_use":
                        block["input"] = arguments("".join(pieces))
                        written.append("".join(pieces))
                case "message_delta":
                    document |= data["delta"]
                    document["usage"] |= data["usage"]
        assert events[-1].name == "message_stop"
        return {**self.of_document(document, question), "arguments as text": [written]}


class Responses(Protocol):
    """OpenAI's responses. A stream can be resumed if the response is kept."""

    name = "responses"
    path = "/v1/responses"
    _BLOCKS: ClassVar = {"message": "text", "reasoning": "thinking", "function_call": "tool_use"}

    def can_ask(self, question: Question) -> bool:
        return bool(question.messages) and question.n == 1 and not question.min_tokens

    def body(self, question: Question) -> Json:
        body: Json = {"input": question.chat, "max_output_tokens": question.max_tokens, **question.drawing}
        body["stop"] = list(question.stop)
        if question.logprobs is not None:
            body |= {"include": ["message.output_text.logprobs"], "top_logprobs": question.logprobs}
        if question.schema is not None:
            named = {"type": "json_schema", "name": "answer", "schema": question.schema, "strict": True}
            body["text"] = {"format": named}
        if question.tool_choice is not None:
            body["tools"] = [
                {"type": "function", "name": name, "description": told, "parameters": PARAMETERS}
                for name, told in TOOLS.items()
            ]
            body["parallel_tool_calls"] = question.parallel
            named = {"type": "function", "name": question.tool_choice}
            body["tool_choice"] = named if question.tool_choice in TOOLS else question.tool_choice
        return body

    def stream_request(self, question: Question, *, resumable: bool) -> tuple[Json, dict[str, str]]:
        return {**self.streaming_body(question), "store": resumable}, {}

    def stream_id(self, seen: Sequence[Event]) -> str:
        return stream_id_of(self._id(seen)) or ""

    def continuation(self, seen: Sequence[Event]) -> tuple[str, dict[str, str]]:
        return f"{self.path}/{self._id(seen)}?stream=true&starting_after={len(seen) - 1}", {}

    def document_path(self, seen: Sequence[Event]) -> str | None:
        return f"{self.path}/{self._id(seen)}"

    def of_document(self, document: Json, question: Question) -> Facts:
        output, usage = document["output"], document["usage"]
        told = [(item, "".join(part["text"] for part in item.get("content", ()))) for item in output]
        calls = [item for item in output if item["type"] == "function_call"]
        text = "".join(text for item, text in told if item["type"] == "message")
        assert {item["status"] for item in output[:-1]} <= {"completed"}
        facts: Facts = {
            "text": [text],
            "reasoning": ["".join(text for item, text in told if item["type"] == "reasoning")],
            "calls": [[(call["name"], arguments(call["arguments"])) for call in calls]],
            "arguments as text": [[call["arguments"] for call in calls]],
            "blocks": [_merged((self._BLOCKS[item["type"]], text or item.get("name")) for item, text in told)],
            "cut": [document["status"] == "incomplete"],
            "prompt tokens": usage["input_tokens"],
            "cached tokens": usage["input_tokens_details"]["cached_tokens"],
            "completion tokens": usage["output_tokens"],
            "reasoning tokens": usage["output_tokens_details"]["reasoning_tokens"],
        }
        if question.unread:
            logprobs = [each for item in output for part in item["content"] for each in part["logprobs"]]
            facts |= {"raw text": [text], "logprobs of text": [_chat_logprobs({"content": logprobs})]}
        return facts

    def of_events(self, events: Sequence[Event], question: Question) -> Facts:
        told = [json.loads(event.data) for event in events]
        assert [each["sequence_number"] for each in told] == list(range(len(told))), told
        assert [each["type"] for each in told] == [event.name for event in events]
        facts = self.of_document(told[-1]["response"], question)
        pieces = [each["delta"] for each in told if each["type"] == "response.output_text.delta"]
        assert facts["text"] == ["".join(pieces)]
        return facts

    def _id(self, seen: Sequence[Event]) -> str:
        return str(json.loads(seen[0].data)["response"]["id"])


class Native(Protocol):
    """`/stream`."""

    name = "stream"
    path = "/stream"
    has_whole = False

    def can_ask(self, question: Question) -> bool:
        alone = question.n == 1 and not question.min_tokens and question.logprobs is None
        return alone and question.tool_choice is None and question.schema is None

    def body(self, question: Question) -> Json:
        body = {"max_tokens": question.max_tokens, **question.drawing, "stop": list(question.stop)}
        return {**body, **({"prompt": question.prompt} if question.prompt else {"messages": question.chat})}

    def streaming_body(self, question: Question) -> Json:
        return self.body(question)

    def of_document(self, document: Json, question: Question) -> Facts:
        """`document`: the data of `done`, with `tokens`."""
        return {
            "raw text": ["".join(token["generated_text"] for token in document["tokens"])],
            "tokens": [(token["token_id"], token["generated_text"]) for token in document["tokens"]],
            **_endings([document["finish_reason"]]),
            **openai_usage(document["usage"]),
            "seed": document["seed"],
        }

    def of_events(self, events: Sequence[Event], question: Question) -> Facts:
        *tokens, done = events
        assert done.name == "done"
        return self.of_document(
            {**json.loads(done.data), "tokens": [json.loads(token.data) for token in tokens]}, question
        )


class Grpc(Native):
    """`ServeApp/Stream`. Its `body` is that of a `PromptDocument`; an event's data is a `ModelOutputDocument`."""

    name = "grpc"
    path = ""

    def message(self, question: Question) -> PromptDocument:
        """The request."""
        body = self.body(question)
        turns = [Message(**turn) for turn in body.pop("messages", ())]
        return PromptDocument(**body, messages=turns)

    def of_events(self, events: Sequence[Event], question: Question) -> Facts:
        *tokens, last = (ModelOutputDocument.FromString(event.data) for event in events)
        done = last.done
        facts = {
            "raw text": ["".join(token.generated_text for token in tokens)],
            "tokens": [(token.token_id, token.generated_text) for token in tokens],
            **_endings([done.finish_reason]),
            "prompt tokens": done.usage.prompt_tokens,
            "completion tokens": done.usage.completion_tokens,
            "cached tokens": done.usage.cached_prompt_tokens,
            "seed": done.seed,
        }
        assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens, MessageToDict(last)
        return facts


_SHOWN = {"text": "text", "thinking": "thinking", "tool_use": "name"}
COUNTED = ("prompt tokens", "completion tokens", "cached tokens")


def openai_usage(usage: Json) -> Facts:
    """The facts of OpenAI's usage."""
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    return {
        "prompt tokens": usage["prompt_tokens"],
        "completion tokens": usage["completion_tokens"],
        "cached tokens": usage["prompt_tokens_details"]["cached_tokens"],
        "reasoning tokens": usage["completion_tokens_details"]["reasoning_tokens"],
    }


def arguments(text: str) -> Json:
    """The arguments of a call. Of those that a limit cut, what is whole."""
    try:
        value = from_json(text, allow_partial=True)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _endings(reasons: list[str]) -> Facts:
    assert set(reasons) <= {"stop", "length", "tool_calls"}
    return {"finish": reasons, "cut": [reason == "length" for reason in reasons]}


def _joined_chunks(events: Sequence[Event], join: Any) -> Json:
    """OpenAI's chunks as one document; `join` adds a chunk's entry to its choice."""
    *chunks, last = events
    assert last.data == b"[DONE]"
    choices: dict[int, Json] = {}
    usage = None
    for event in chunks:
        chunk = json.loads(event.data)
        usage = chunk["usage"] or usage
        for entry in chunk["choices"]:
            empty = {"index": entry["index"], "logprobs": None, "finish_reason": None}
            choice = choices.setdefault(entry["index"], empty)
            assert choice["finish_reason"] is None, "nothing comes after the end"
            join(choice, entry)
            choice["finish_reason"] = entry["finish_reason"]
    return {"choices": list(choices.values()), "usage": usage}


def _chat_logprobs(logprobs: Json | None) -> list[Any]:
    content = (logprobs or {}).get("content") or []
    return [
        (each["token"], each["logprob"], [(top["token"], top["logprob"]) for top in each["top_logprobs"]])
        for each in content
    ]


def _without_empty(lists: Json | None) -> Json:
    """A stream of an answer without text has no lists, and a document has empty ones."""
    return {name: values for name, values in (lists or {}).items() if values}


def _all_of(blocks: Sequence[Json], kind: str) -> str:
    return "".join(block[kind] for block in blocks if block["type"] == kind)


def _merged(blocks: Any) -> list[Any]:
    return [block for block in blocks if block[1]]
