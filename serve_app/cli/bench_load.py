"""Streamed chats at any server that speaks OpenAI's API, and when their pieces came.

Closed loop: so many clients, each of which asks again when it has its answer. Open loop: chats that come at random
moments at a given rate, whether earlier ones are answered or not; each counts from the moment in which it was due, so
that a client that falls behind hides no wait (coordinated omission).
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from httpx_sse import EventSource

_WORDS = ("river", "stone", "cloud", "apple", "window", "garden", "paper", "bridge", "candle", "forest", "winter")
_SHOWN = 200
"""Characters of an error that are kept."""


@dataclass(slots=True)
class Outcome:
    """One chat, in seconds from the moment in which it was due, by a monotonic clock."""

    due_s: float
    """From the start of the level."""
    pieces_s: list[float] = field(default_factory=list)
    """When each piece of the answer came. A piece is a token, or several that came together."""
    ended_s: float = 0.0
    tokens: int = 0
    """As the server's usage says, else the number of pieces."""
    error: str = ""
    """Empty for an answer that came to its end."""


@dataclass(slots=True)
class Level:
    """All chats of one load."""

    name: str
    outcomes: list[Outcome]
    seconds: float
    """From its start to the end of its last chat."""


class Load:
    """Asks one server."""

    def __init__(
        self, http: httpx.AsyncClient, url: str, model: str, *, words: int, max_tokens: int, seed: int
    ) -> None:
        """`url`: that of `/chat/completions`. `words`: of each question, which is like no other."""
        self._http = http
        self._url = url
        self._model = model
        self._words = words
        self._max_tokens = max_tokens
        self._chance = random.Random(seed)

    async def closed(self, clients: int, seconds: float) -> Level:
        """`clients` chats at a time, until `seconds` are over. Those that have begun are waited for."""
        began, outcomes = time.perf_counter(), []

        async def client() -> None:
            while (due := time.perf_counter()) - began < seconds:
                outcomes.append(await self._chat(began, due))

        await asyncio.gather(*(client() for _ in range(clients)))
        return Level(f"{clients} clients", outcomes, time.perf_counter() - began)

    async def open(self, per_s: float, seconds: float) -> Level:
        """`per_s` chats a second on average, at random moments."""
        began, asked = time.perf_counter(), []
        due = began
        while (due := due + self._chance.expovariate(per_s)) < began + seconds:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            asked.append(asyncio.create_task(self._chat(began, due)))
        outcomes = await asyncio.gather(*asked)
        return Level(f"{per_s:g} a second", outcomes, time.perf_counter() - began)

    async def _chat(self, began: float, due: float) -> Outcome:
        outcome = Outcome(due - began)
        try:
            await self._ask(outcome, due)
        except httpx.HTTPError as error:
            outcome.error = f"{type(error).__name__}: {error}"[:_SHOWN]
        except _Garbled as error:
            outcome.error = f"an event is no chunk of OpenAI's API: {error}"[:_SHOWN]
        outcome.ended_s = time.perf_counter() - due
        outcome.tokens = outcome.tokens or len(outcome.pieces_s)
        return outcome

    async def _ask(self, outcome: Outcome, due: float) -> None:
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": self._question()}],
            "max_tokens": self._max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        finished = False
        async with self._http.stream("POST", self._url, json=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                outcome.error = f"{response.status_code}: {_message(text)}"[:_SHOWN]
                return
            async for event in EventSource(response).aiter_sse():
                if event.data == "[DONE]":
                    break
                finished = self._take(_chunk(event.data), outcome, due) or finished
        if not (finished or outcome.error):
            outcome.error = "the stream ended before the answer did"

    @staticmethod
    def _take(chunk: dict[str, Any], outcome: Outcome, due: float) -> bool:
        """Note one event of a stream. Returns whether it ends the answer."""
        if "error" in chunk:
            outcome.error = _message(json.dumps(chunk))[:_SHOWN]
            return True
        if isinstance(usage := chunk.get("usage"), dict):
            outcome.tokens = usage.get("completion_tokens") or outcome.tokens
        ends = False
        for choice in chunk.get("choices") or ():
            if any((choice.get("delta") or {}).get(name) for name in ("content", "reasoning_content", "reasoning")):
                outcome.pieces_s.append(time.perf_counter() - due)
            ends = ends or choice.get("finish_reason") is not None
        return ends

    def _question(self) -> str:
        words = " ".join(self._chance.choice(_WORDS) for _ in range(self._words))
        return f"Number {self._chance.randrange(10**9)}. Write a long story with these words: {words}."


class _Garbled(Exception):
    """What a server sent is not what a client of OpenAI's API can read."""


def _chunk(data: str) -> dict[str, Any]:
    """The JSON of an event. Raises `_Garbled`."""
    try:
        chunk = json.loads(data)
    except ValueError as error:
        raise _Garbled(data) from error
    choices = chunk.get("choices") if isinstance(chunk, dict) else chunk
    if choices is not None and not (isinstance(choices, list) and all(isinstance(one, dict) for one in choices)):
        raise _Garbled(data)
    return dict(chunk)


def _message(text: str) -> str:
    """The sentence in an error of OpenAI's shape, else the text."""
    try:
        error = json.loads(text)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return text.strip()


def percentile(values: Sequence[float], share: float) -> float | None:
    """The nearest-rank percentile; None of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


@dataclass(frozen=True, slots=True)
class Summary:
    """What is told of a level. Times in seconds, as (median, 99th percentile); None where nothing came."""

    name: str
    asked: int
    answered: int
    tokens_per_s: float
    """Of answers that came to their end, from the level's start to the end of its last chat."""
    first_s: tuple[float | None, float | None]
    between_s: tuple[float | None, float | None]
    """Between two pieces of one answer."""
    whole_s: tuple[float | None, float | None]
    errors: Counter[str]

    @classmethod
    def of(cls, level: Level) -> Summary:
        """Of these chats."""
        done = [one for one in level.outcomes if not one.error]
        gaps = [late - early for one in done for early, late in zip(one.pieces_s, one.pieces_s[1:], strict=False)]
        return cls(
            level.name,
            len(level.outcomes),
            len(done),
            sum(one.tokens for one in done) / level.seconds if level.seconds else 0.0,
            _both([one.pieces_s[0] for one in done if one.pieces_s]),
            _both(gaps),
            _both([one.ended_s for one in done]),
            Counter(one.error for one in level.outcomes if one.error),
        )


def _both(values: Sequence[float]) -> tuple[float | None, float | None]:
    return percentile(values, 0.5), percentile(values, 0.99)
