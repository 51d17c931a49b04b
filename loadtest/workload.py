"""What the clients of a chaos run ask, and when: a function of the seed alone.

Promises that every question carries its own seed, so that its answer is known beforehand. Knows no server.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import cycle, islice
from typing import Any

_SUBJECTS = (
    "the tides", "a sourdough starter", "binary search", "the French Revolution", "a bicycle's gears", "photosynthesis",
    "compound interest", "the offside rule", "plate tectonics", "prime numbers", "the water cycle", "vaccines",
)  # fmt: skip
_TASKS = (
    "Explain {} to a ten-year-old.",
    "List three surprising facts about {}.",
    "Write two short paragraphs about {}, the second of them with an example from everyday life, and end with a "
    "question that makes the reader curious to find out more about {}, its history and the people behind it.",
)
_STOPS = (".", "\n", " the", " is a", ", and", "ing ")
_GREEDY_SHARE = 0.4
_RESUME_SHARE = 0.5
_NEAR_FAULT_SHARE = 0.5
_NEAR_FAULT_S = 3.0
"""An answer takes one to five seconds here: a client that came so long before a fault is still reading."""
SHORTEST_ANSWER_TOKENS, MEAN_MORE_TOKENS, LONGEST_ANSWER_TOKENS = 48, 120, 384


class Wire(StrEnum):
    """Which endpoint is asked."""

    NATIVE = "/stream"
    CHAT = "/v1/chat/completions"
    RESPONSES = "/v1/responses"
    MESSAGES = "/v1/messages"
    GRPC = "/serve_app.v1.ServeApp/Stream"


class Kind(StrEnum):
    """What a question asks for: of which the report counts each."""

    PLAIN = "plain"
    """Text, by /stream and /v1/chat/completions in turns."""
    STRUCTURED = "structured"
    """JSON that matches a schema, by /v1/chat/completions."""
    TOOLS = "tools"
    """Tool calls that are forced, by /v1/chat/completions."""
    RESPONSES = "responses"
    ANTHROPIC = "anthropic"
    GRPC = "grpc"


_P, _S, _T, _R, _A, _G = Kind
MIX = (_P, _S, _T, _R, _A, _G, _S, _T, _P, _S, _T, _R, _A, _G, _S, _T, _P, _S, _T, _P)
"""Of 20 questions 5 are structured, 5 have tools, 2 each go by Responses, Anthropic and gRPC. Few have some of all."""
_STOP_SHARES = {Wire.MESSAGES: 0.5}
"""Anthropic says which stop sequence it was."""
_TOOLS_SHARE = 0.4
"""Of the questions by Responses and Anthropic: they force a tool call."""


class Mode(StrEnum):
    """How a client takes its answer."""

    PLAIN = "plain"
    """Streamed; when its connection goes it repeats its request."""
    RESUME = "resume"
    """Streamed with X-Stream-Resume; when its connection goes it takes up where it was."""
    WHOLE = "whole"
    """Not streamed."""


@dataclass(frozen=True, slots=True)
class Question:
    """One distinct request, without what depends on how its answer is taken."""

    wire: Wire
    body: dict[str, Any]
    kind: Kind = Kind.PLAIN

    @property
    def max_tokens(self) -> int:
        """Of one choice."""
        tokens: int = self.body["max_output_tokens" if self.wire is Wire.RESPONSES else "max_tokens"]
        return tokens

    @property
    def choices(self) -> int:
        """How many answers it asks for."""
        choices: int = self.body.get("n", 1)
        return choices

    @property
    def has_logprobs(self) -> bool:
        """Whether its answer has logprobs."""
        return bool(self.body.get("logprobs") or self.body.get("include"))

    @property
    def may_be_whole(self) -> bool:
        """Whether its answer can be taken whole, and compared with a streamed one: Anthropic's calls can't."""
        return self.wire in (Wire.CHAT, Wire.RESPONSES) or (self.wire is Wire.MESSAGES and "tools" not in self.body)

    def asked(self, mode: Mode) -> dict[str, Any]:
        """The body that is sent over HTTP. A response that is to outlive its connection is a background one."""
        match self.wire:
            case Wire.CHAT if mode is not Mode.WHOLE:
                return {**self.body, "stream": True, "stream_options": {"include_usage": True}}
            case Wire.MESSAGES if mode is not Mode.WHOLE:
                return {**self.body, "stream": True}
            case Wire.RESPONSES if mode is Mode.RESUME:
                return {**self.body, "stream": True, "background": True}
            case Wire.RESPONSES if mode is Mode.PLAIN:
                return {**self.body, "stream": True, "store": False}
            case _:
                return self.body


@dataclass(frozen=True, slots=True)
class Visit:
    """One client of the run: it asks one question, once."""

    number: int
    at_s: float
    """From the start of the load."""
    question: int
    mode: Mode
    drops: tuple[int, ...] = ()
    """It drops its own connection when it has so many events, and resumes."""


def questions(seed: int, count: int, kinds: Collection[Kind] = tuple(Kind)) -> list[Question]:
    """`count` distinct questions of these kinds, in the shares of `MIX`: greedy and sampled, with every setting that a
    continuation must keep."""
    generator = random.Random(f"questions {seed}")
    plain_wires = cycle((Wire.NATIVE, Wire.CHAT))
    wanted = islice(cycle(kind for kind in MIX if kind in kinds), count)
    return [_question(generator, kind, plain_wires) for kind in wanted]


_WIRES = {Kind.RESPONSES: Wire.RESPONSES, Kind.ANTHROPIC: Wire.MESSAGES, Kind.GRPC: Wire.GRPC}


def _question(generator: random.Random, kind: Kind, plain_wires: Iterator[Wire]) -> Question:
    wire = next(plain_wires) if kind is Kind.PLAIN else _WIRES.get(kind, Wire.CHAT)
    subject = generator.choice(_SUBJECTS)
    text = generator.choice(_TASKS).format(subject, subject)
    body = _sampling(generator, wire)
    if wire in (Wire.NATIVE, Wire.GRPC) and generator.random() < 0.3:
        body["prompt"] = f"A short text about {subject}:"
    else:
        body["messages"] = [{"role": "user", "content": text}]
    forced = kind in (Kind.STRUCTURED, Kind.TOOLS)
    if kind in (Kind.RESPONSES, Kind.ANTHROPIC):
        forced = generator.random() < _TOOLS_SHARE
    if kind is Kind.STRUCTURED:
        body |= _structured(generator)
    elif forced:
        body |= _tools(wire)
    elif wire is not Wire.RESPONSES and generator.random() < _STOP_SHARES.get(wire, 0.25):
        body["stop_sequences" if wire is Wire.MESSAGES else "stop"] = generator.sample(_STOPS, 2)
    if wire is Wire.CHAT:
        # A grammar may be at its end before so many tokens.
        body |= _chat_settings(generator, 0 if forced else body["max_tokens"])
    if wire is Wire.RESPONSES:
        body = _as_response(generator, body)
    return Question(wire, body, kind)


def _sampling(generator: random.Random, wire: Wire) -> dict[str, Any]:
    body: dict[str, Any] = {
        "max_tokens": min(
            LONGEST_ANSWER_TOKENS, SHORTEST_ANSWER_TOKENS + int(generator.expovariate(1 / MEAN_MORE_TOKENS))
        ),
        "seed": generator.getrandbits(32),
        "temperature": 0,
    }
    if generator.random() > _GREEDY_SHARE:
        highest = 1.0 if wire is Wire.MESSAGES else 1.2
        body["temperature"] = round(generator.uniform(0.6, highest), 2)
        body |= generator.choice(({"top_p": 0.9}, {"top_k": 40}, {"min_p": 0.05}, {}))
    if generator.random() < 0.35:
        body |= generator.choice(
            (
                {"repetition_penalty": 1.2},
                {"presence_penalty": 0.6},
                {"frequency_penalty": 0.5, "presence_penalty": 0.3},
            )
        )
    return body


_LESSON = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "minLength": 5, "maxLength": 60},
        "level": {"enum": ["child", "student", "expert"]},
        "minutes": {"type": "integer", "minimum": 1, "maximum": 90},
        "facts": {
            "type": "array",
            "items": {"type": "string", "minLength": 20, "maxLength": 120},
            "minItems": 2,
            "maxItems": 4,
        },
    },
    "required": ["title", "level", "minutes", "facts"],
    "additionalProperties": False,
}
_REVIEW = {
    "type": "object",
    "properties": {
        "summary": {"type": "string", "minLength": 80, "maxLength": 400},
        "scores": {"type": "array", "items": {"type": "number"}, "minItems": 3, "maxItems": 3},
        "source": {"anyOf": [{"type": "string", "maxLength": 40}, {"type": "null"}]},
    },
    "required": ["summary", "scores", "source"],
    "additionalProperties": False,
}
"""Schemas whose texts are long enough for a fault to come while they are written."""
_FUNCTIONS = (("look_up", "Looks a subject up in an encyclopedia.", _REVIEW), ("teach", "Plans a lesson.", _LESSON))


def _structured(generator: random.Random) -> dict[str, Any]:
    name, schema = generator.choice((("lesson", _LESSON), ("review", _REVIEW)))
    return {"response_format": {"type": "json_schema", "json_schema": {"name": name, "strict": True, "schema": schema}}}


def _tools(wire: Wire) -> dict[str, Any]:
    """Tools of which one has to be called, as the protocol has them."""
    if wire is Wire.MESSAGES:
        tools = [{"name": name, "description": says, "input_schema": schema} for name, says, schema in _FUNCTIONS]
        return {"tools": tools, "tool_choice": {"type": "any"}}
    functions = [{"name": name, "description": says, "parameters": schema} for name, says, schema in _FUNCTIONS]
    if wire is Wire.RESPONSES:
        return {"tools": [{"type": "function", **function} for function in functions], "tool_choice": "required"}
    return {"tools": [{"type": "function", "function": function} for function in functions], "tool_choice": "required"}


def _as_response(generator: random.Random, body: dict[str, Any]) -> dict[str, Any]:
    """The same by the names of /v1/responses."""
    made = {name: value for name, value in body.items() if name not in ("messages", "max_tokens")}
    made |= {"input": body["messages"], "max_output_tokens": body["max_tokens"]}
    if "tools" not in body and generator.random() < 0.4:
        made |= {"include": ["message.output_text.logprobs"], "top_logprobs": generator.randint(0, 3)}
    return made


def _chat_settings(generator: random.Random, max_tokens: int) -> dict[str, Any]:
    """`max_tokens`: 0 where there is to be no `min_tokens`."""
    settings: dict[str, Any] = {}
    if generator.random() < 0.5:
        settings |= {"logprobs": True, "top_logprobs": generator.randint(0, 3)}
    if generator.random() < 0.25 and max_tokens:
        settings["min_tokens"] = max_tokens // 2
    if generator.random() < 0.15:
        settings["n"] = 2
    return settings


def visits(seed: int, count: int, seconds: float, asked: list[Question], faults_s: Sequence[float] = ()) -> list[Visit]:
    """`count` clients over `seconds`, in order; half of them come shortly before one of `faults_s`, to be hit by it.

    Every question is asked once before any is asked again, so the kinds keep their shares.
    """
    generator = random.Random(f"visits {seed}")
    times = sorted(_arrival(generator, seconds, faults_s) for _ in range(count))
    drawn: list[int] = []
    while len(drawn) < count:
        drawn += generator.sample(range(len(asked)), k=len(asked))
    return [_visit(generator, number, at_s, asked, drawn[number]) for number, at_s in enumerate(times)]


def _arrival(generator: random.Random, seconds: float, faults_s: Sequence[float]) -> float:
    if faults_s and generator.random() < _NEAR_FAULT_SHARE:
        return min(seconds, max(0.0, generator.choice(faults_s) - generator.uniform(0, _NEAR_FAULT_S)))
    return generator.uniform(0, seconds)


def _visit(generator: random.Random, number: int, at_s: float, asked: list[Question], question: int) -> Visit:
    if generator.random() < _RESUME_SHARE:
        events = asked[question].max_tokens
        wanted = generator.choice((0, 0, 1, 2))
        drops = sorted(generator.sample(range(1, events), k=min(wanted, events - 1)))
        return Visit(number, at_s, question, Mode.RESUME, tuple(drops))
    whole = asked[question].may_be_whole and generator.random() < 0.5
    return Visit(number, at_s, question, Mode.WHOLE if whole else Mode.PLAIN)
