"""What the clients of a chaos run ask, and when: a function of the seed alone.

Promises that every question carries its own seed, so that its answer is known beforehand. Knows no server.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
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
    """One distinct request, as it is streamed."""

    wire: Wire
    body: dict[str, Any]

    @property
    def max_tokens(self) -> int:
        """Of one choice."""
        tokens: int = self.body["max_tokens"]
        return tokens

    @property
    def choices(self) -> int:
        """How many answers it asks for."""
        choices: int = self.body.get("n", 1)
        return choices


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


def questions(seed: int, count: int) -> list[Question]:
    """`count` distinct questions: both endpoints, greedy and sampled, every setting that a continuation must keep."""
    generator = random.Random(f"questions {seed}")
    return [_question(generator, number) for number in range(count)]


def _question(generator: random.Random, number: int) -> Question:
    subject = generator.choice(_SUBJECTS)
    text = generator.choice(_TASKS).format(subject, subject)
    wire = Wire.CHAT if number % 2 else Wire.NATIVE
    body: dict[str, Any] = {
        "max_tokens": min(
            LONGEST_ANSWER_TOKENS, SHORTEST_ANSWER_TOKENS + int(generator.expovariate(1 / MEAN_MORE_TOKENS))
        ),
        "seed": generator.getrandbits(32),
        "temperature": 0,
    }
    if wire is Wire.NATIVE and generator.random() < 0.3:
        body["prompt"] = f"A short text about {subject}:"
    else:
        body["messages"] = [{"role": "user", "content": text}]
    if generator.random() > _GREEDY_SHARE:
        body["temperature"] = round(generator.uniform(0.6, 1.2), 2)
        body |= generator.choice(({"top_p": 0.9}, {"top_k": 40}, {"min_p": 0.05}, {}))
    if generator.random() < 0.35:
        body |= generator.choice(
            (
                {"repetition_penalty": 1.2},
                {"presence_penalty": 0.6},
                {"frequency_penalty": 0.5, "presence_penalty": 0.3},
            )
        )
    if generator.random() < 0.25:
        body["stop"] = generator.sample(_STOPS, 2)
    if wire is Wire.CHAT:
        body |= _chat_settings(generator, body["max_tokens"])
    return Question(wire, body)


def _chat_settings(generator: random.Random, max_tokens: int) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    if generator.random() < 0.5:
        settings |= {"logprobs": True, "top_logprobs": generator.randint(0, 3)}
    if generator.random() < 0.25:
        settings["min_tokens"] = max_tokens // 2
    if generator.random() < 0.1:
        settings["n"] = 2
    return settings


def visits(seed: int, count: int, seconds: float, asked: list[Question], faults_s: Sequence[float] = ()) -> list[Visit]:
    """`count` clients over `seconds`, in order; half of them come shortly before one of `faults_s`, to be hit by it."""
    generator = random.Random(f"visits {seed}")
    times = sorted(_arrival(generator, seconds, faults_s) for _ in range(count))
    return [_visit(generator, number, at_s, asked) for number, at_s in enumerate(times)]


def _arrival(generator: random.Random, seconds: float, faults_s: Sequence[float]) -> float:
    if faults_s and generator.random() < _NEAR_FAULT_SHARE:
        return min(seconds, max(0.0, generator.choice(faults_s) - generator.uniform(0, _NEAR_FAULT_S)))
    return generator.uniform(0, seconds)


def _visit(generator: random.Random, number: int, at_s: float, asked: list[Question]) -> Visit:
    question = generator.randrange(len(asked))
    if generator.random() < _RESUME_SHARE:
        events = asked[question].max_tokens
        wanted = generator.choice((0, 0, 1, 2))
        drops = sorted(generator.sample(range(1, events), k=min(wanted, events - 1)))
        return Visit(number, at_s, question, Mode.RESUME, tuple(drops))
    whole = asked[question].wire is Wire.CHAT and generator.random() < 0.5
    return Visit(number, at_s, question, Mode.WHOLE if whole else Mode.PLAIN)
