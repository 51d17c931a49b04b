"""A deployment with a model server's methods and no model: its tokens are a function of the seed and the position.

What it does wrong on purpose, a test asks for with a prompt of one id.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncGenerator
from contextlib import aclosing
from enum import IntEnum
from pathlib import Path

import ray
from msgspec.structs import replace
from ray import serve

from serve_app.config import AppConfig
from serve_app.core import (
    Failure,
    FailureCode,
    Fingerprint,
    FinishReason,
    GenerationRequest,
    LoadStage,
    ModelCard,
    Reply,
    SamplingParams,
    TokenBatch,
)
from serve_app.deployments.dispatch.channel_writer import TokenChannels, send
from serve_app.deployments.dispatch.router import CHANNEL_KEY, FINGERPRINT_KEY
from serve_app.deployments.status.progress import ProgressBoard

IDS = 256
"""Its answers have ids below this."""
CARD = ModelCard(
    name="fake",
    fingerprint=Fingerprint("fake"),
    context_tokens=1000,
    kv_capacity_tokens=10_000,
    vocab_size=1000,
    weights_bytes=1000,
    kv_cache_bytes=1000,
    device="cpu",
    dtype="float32",
    attention_backend="none",
    notes=("it is not real",),
)


class Deed(IntEnum):
    """The id: what happens after the second token of a first attempt."""

    NOTHING = 0
    KILLED = 1
    CANCELLED = 2
    RAISES = 3
    ENDS = 4


def request(deed: Deed = Deed.NOTHING, tokens: int = 6, seed: int = 7) -> GenerationRequest:
    """A request for `tokens` tokens of the fake model."""
    return GenerationRequest("a-request", CARD.fingerprint, (deed,), SamplingParams(seed=seed), max_new_tokens=tokens)


def expected_tokens(seed: int, tokens: int) -> list[int]:
    """What the fake model answers."""
    return [(seed * 31 + index * 7) % IDS for index in range(tokens)]


class TwoUntilTold:
    """An autoscaling policy: two replicas until the file `told` is there, one from then on."""

    def __init__(self, told: str) -> None:
        self._told = Path(told)

    def __call__(self, context: object) -> tuple[int, dict[str, object]]:
        return 1 if self._told.exists() else 2, {}


class FakeModelServer:
    """To be wrapped by `serve.deployment` with the options that a test needs."""

    async def __init__(
        self,
        config: AppConfig,
        token_s: float = 0.01,
        loaded: Path | None = None,
        fingerprint: Fingerprint = CARD.fingerprint,
        enough: Path | None = None,
    ) -> None:
        """`loaded`: a file; loading takes until it is there. `fingerprint`: of the weights that it pretends to have.

        `enough`: a file; once it is there, answers end with their next token. So they last as long as a test needs.
        """
        self._enough = enough
        self._fingerprint = fingerprint
        self._token_s = token_s
        self._running = 0
        self._channels = TokenChannels()
        await self._channels.listen("127.0.0.1")
        self._healthy = True
        board = ProgressBoard(serve.get_replica_context().app_name, config)
        while loaded is not None and not await asyncio.to_thread(loaded.exists):
            board.report(LoadStage("loading weights", 0.5))
            await asyncio.sleep(0.05)
        board.publish(replace(CARD, fingerprint=fingerprint))

    def record_replica_metadata(self) -> dict[str, str]:
        return {FINGERPRINT_KEY: self._fingerprint, CHANNEL_KEY: str(self._channels.address or "")}

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Reply, None]:
        async with (
            aclosing(self._replies(request)) as replies,
            aclosing(send(request, replies, self._channels)) as by_call,
        ):
            async for reply in by_call:
                yield reply

    async def messages(self) -> int:
        """Sent through channels so far."""
        return self._channels.messages

    async def _replies(self, request: GenerationRequest) -> AsyncGenerator[Reply, None]:
        if request.fingerprint != self._fingerprint:
            yield Failure(FailureCode.WRONG_WEIGHTS, "other weights")
            return
        self._running += 1
        try:
            tokens = expected_tokens(request.sampling.seed, request.max_new_tokens)
            first_attempt = not request.output_token_ids
            for index in range(len(request.output_token_ids), len(tokens)):
                if index == 2 and first_attempt and not self._do(request.prompt_token_ids):
                    return
                reason = FinishReason.LENGTH if index == len(tokens) - 1 else None
                if self._enough is not None and self._enough.exists():
                    reason = FinishReason.STOP
                yield TokenBatch(index, (tokens[index],), finish_reason=reason)
                if reason is not None:
                    return
                await asyncio.sleep(self._token_s)
        finally:
            self._running -= 1

    def _do(self, prompt: tuple[int, ...]) -> bool:
        """What the prompt asks for; False when the stream is to end."""
        deed = Deed(prompt[0]) if len(prompt) == 1 else Deed.NOTHING
        if deed is Deed.KILLED:
            os.kill(os.getpid(), signal.SIGKILL)
        if deed is Deed.CANCELLED:
            raise asyncio.CancelledError
        if deed is Deed.RAISES:
            raise ZeroDivisionError("a bug in the replica")
        return deed is not Deed.ENDS

    async def running(self) -> int:
        return self._running

    async def pid(self) -> int:
        return os.getpid()

    async def where(self) -> tuple[int, int]:
        """Its process, and how many requests it computes."""
        return os.getpid(), self._running

    async def node(self) -> str:
        return str(ray.get_runtime_context().get_node_id())

    async def fall_ill(self) -> None:
        self._healthy = False

    async def check_health(self) -> None:
        if not self._healthy:
            raise RuntimeError("ill")
