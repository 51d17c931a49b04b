"""A `ReplicaClient` whose output is a function of seed, choice, prompt and position, cut and interrupted at random."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

from fake_replica import ALIVE

from serve_app.core import GenerationRequest, GenerationStats, LoadStage, ModelCard, Reply, TokenBatch, TokenLogprobs
from serve_app.generation.replica import ReplicaLost

Speaks = Callable[[GenerationRequest], Sequence[int]]
"""The ids that answer a request. Whoever asks for more gets them again from the beginning."""
FIRST_CACHED, LATER_CACHED = 2, 64
"""Cached tokens of the prompt: what an attempt that begins an output says, and what one that continues it says."""
MOST_TOKENS_OF_A_DYING_ATTEMPT = 6


@dataclass
class SeededReplica:
    """Answers what `speaks` says, in batches of any size, whatever attempts it takes."""

    state: ModelCard
    speaks: Speaks
    chance: random.Random = field(default_factory=lambda: random.Random(0))
    """Decides how the output is cut into batches, and where an attempt dies."""
    deaths: int = 0
    """How many attempts of each choice die."""
    requests: list[GenerationRequest] = field(default_factory=list)
    attempts: Counter[int] = field(default_factory=Counter)
    """Of each choice, since `forget`."""

    def forget(self, *, deaths: int = 0) -> None:
        """Another answer is to come; `deaths` attempts of each of its choices die."""
        self.deaths = deaths
        self.requests.clear()
        self.attempts.clear()

    async def open(self, request: GenerationRequest) -> AsyncGenerator[Reply, None]:
        self.requests.append(request)
        self.attempts[request.choice] += 1
        ids = self.speaks(request)
        begun = index = len(request.output_token_ids)
        assert request.output_token_ids == tuple(ids[place % len(ids)] for place in range(begun))
        dies_at = None
        if self.attempts[request.choice] <= self.deaths:
            dies_at = begun + self.chance.randrange(MOST_TOKENS_OF_A_DYING_ATTEMPT)
        while True:
            await asyncio.sleep(0)
            end = index + self.chance.choice((1, 1, 2, 3, 8, 40))
            if dies_at is not None:
                if index >= dies_at:
                    raise ReplicaLost("it died")
                end = min(end, dies_at)
            if self.chance.random() < 0.1:
                yield ALIVE
            batch = _batch(request, ids, index, end, begins=index == begun)
            yield batch
            if batch.finish_reason is not None:
                return
            index += len(batch.token_ids)

    async def model(self) -> ModelCard | LoadStage:
        return self.state


def _batch(request: GenerationRequest, ids: Sequence[int], first: int, end: int, *, begins: bool) -> TokenBatch:
    """The output from `first` up to `end`, or to where it ends."""
    tokens: list[int] = []
    finish = None
    while finish is None and first + len(tokens) < end:
        tokens.append(ids[(first + len(tokens)) % len(ids)])
        finish = request.finish_reason(first + len(tokens), tokens[-1])
    cached = LATER_CACHED if request.output_token_ids else FIRST_CACHED
    stats = GenerationStats(cached_prompt_tokens=cached) if begins or finish else None
    return TokenBatch(first, tuple(tokens), _logprobs(request, first, tokens), finish, stats)


def _logprobs(request: GenerationRequest, first: int, tokens: Sequence[int]) -> tuple[TokenLogprobs, ...] | None:
    """A function of token and position."""
    top = request.sampling.logprobs
    if top is None:
        return None
    return tuple(
        TokenLogprobs(-token / 512 - place / 64, tuple(((token + k) % 512, -k / 8 - place / 64) for k in range(top)))
        for place, token in enumerate(tokens, first)
    )
