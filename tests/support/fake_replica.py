"""A `ReplicaClient` that plays scripts: what each attempt says, and when it dies. Shared by tests of several rooms."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

from serve_app.core import (
    Failure,
    Fingerprint,
    FinishReason,
    GenerationRequest,
    GenerationStats,
    LoadStage,
    ModelCard,
    PromptLogprobs,
    Reply,
    SamplingParams,
    TokenBatch,
    TokenLogprobs,
)
from serve_app.generation.request import ResolvedRequest


def card(**changes: object) -> ModelCard:
    """A ready replica's card."""
    values: dict[str, object] = {
        "name": "tiny",
        "fingerprint": Fingerprint("tiny@1"),
        "context_tokens": 256,
        "kv_capacity_tokens": 4096,
        "vocab_size": 512,
        "weights_bytes": 1,
        "kv_cache_bytes": 1,
        "device": "cpu",
        "dtype": "float32",
        "attention_backend": "plain",
    }
    return ModelCard(**(values | changes))  # type: ignore[arg-type]


def generation_request(**changes: object) -> GenerationRequest:
    """A request for ten tokens."""
    values: dict[str, object] = {
        "request_id": "r1",
        "fingerprint": Fingerprint("tiny@1"),
        "prompt_token_ids": (1, 2, 3),
        "sampling": SamplingParams(seed=7),
        "max_new_tokens": 10,
    }
    return GenerationRequest(**(values | changes))  # type: ignore[arg-type]


def resolved(*requests: GenerationRequest) -> ResolvedRequest:
    """What a caller's request for these choices is resolved to."""
    return ResolvedRequest("tiny", requests, False, (), len(requests))


Step = Reply | BaseException | float | None
"""A reply to yield, an exception to raise, seconds to sleep, or None to fall silent for good."""
Script = Callable[[GenerationRequest], Sequence[Step]]


def tokens(first: int, *ids: int, finish: FinishReason | None = None) -> TokenBatch:
    """A batch of `ids` that starts at position `first`."""
    stats = GenerationStats(cached_prompt_tokens=2) if finish else None
    return TokenBatch(first, ids, finish_reason=finish, stats=stats)


ALIVE = TokenBatch(0)


@dataclass
class FakeReplica:
    """Plays `scripts` one after the other, the last one again and again."""

    scripts: list[Script]
    state: ModelCard | LoadStage = field(default_factory=card)
    requests: list[GenerationRequest] = field(default_factory=list)
    closed: int = 0
    """Attempts whose generator has ended, for whatever reason."""
    cancelled: int = 0
    """Attempts that were cut off while they had more to say."""

    async def open(self, request: GenerationRequest) -> AsyncGenerator[Reply, None]:
        script = self.scripts[min(len(self.requests), len(self.scripts) - 1)]
        self.requests.append(request)
        try:
            for step in script(request):
                await asyncio.sleep(0)
                match step:
                    case None:
                        await asyncio.get_running_loop().create_future()
                    case float():
                        await asyncio.sleep(step)
                    case BaseException():
                        raise step
                    case _:
                        yield step
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise
        finally:
            self.closed += 1

    async def model(self) -> ModelCard | LoadStage:
        return self.state


def says(*steps: Step) -> Script:
    """A script that doesn't look at its request."""
    return lambda request: steps


def counts(
    total: int | None = None, *, pause_s: float | None = None, ids: Callable[[int], int] | None = None
) -> Script:
    """A well-behaved model: token i is 100 + i (or `ids(i)`), one a batch, continued where the request left off."""

    def script(request: GenerationRequest) -> list[Step]:
        of_prompt = prompt_scores(request) if request.needs_prompt_logprobs else None
        if request.max_new_tokens == 0:
            return [TokenBatch(0, (), None, FinishReason.LENGTH, GenerationStats(), of_prompt)]
        last = (request.max_new_tokens if total is None else min(total, request.max_new_tokens)) - 1
        steps: list[Step] = []
        for index in range(len(request.output_token_ids), last + 1):
            token = 100 + index if ids is None else ids(index)
            stop = token in request.stop_token_ids
            finish = FinishReason.STOP if stop else FinishReason.LENGTH if index == last else None
            logprobs = None
            if request.sampling.logprobs is not None:
                top = tuple((token + k, -0.5 - k) for k in range(request.sampling.logprobs))
                logprobs = (TokenLogprobs(-0.5, top),)
            stats = GenerationStats(cached_prompt_tokens=2) if finish else None
            if pause_s is not None:
                steps.append(pause_s)
            steps.append(TokenBatch(index, (token,), logprobs, finish, stats, of_prompt if index == 0 else None))
            if stop:
                break
        return steps

    return script


def prompt_scores(request: GenerationRequest) -> PromptLogprobs:
    """A function of the prompt: each token has the logprob -id / 8 and rank 2, and the most likely ids are 1, 2, ..."""
    ids, top = request.prompt_token_ids[1:], request.prompt_logprobs or 0
    return PromptLogprobs(
        top,
        array("f", [-token_id / 8 for token_id in ids]).tobytes(),
        array("I", [2] * len(ids)).tobytes(),
        array("I", list(range(1, top + 1)) * len(ids)).tobytes(),
        array("f", [-place / 16 for place in range(top)] * len(ids)).tobytes(),
    )


def fails(failure: Failure) -> Script:
    """A replica that refuses at once."""
    return says(failure)
