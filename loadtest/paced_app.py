"""The service with its real ingress and streaming, over an engine that computes nothing: tokens come by the clock.

Serve's `import_path` for `loadtest.streaming_path`. Promises that all streams get their next token in one tick, as from
one forward pass.
"""

# No `from __future__ import annotations`: Serve reads the annotation of `args` to make an AppConfig of the YAML.

import asyncio
import itertools
import os
import threading
import time
from collections.abc import AsyncGenerator, Callable

from ray import serve

import serve_app.app
from serve_app.config import AppConfig
from serve_app.core import (
    Fingerprint,
    FinishReason,
    GenerationRequest,
    GenerationStats,
    LoadStage,
    ModelCard,
    ReplicaLoad,
    Reply,
    TokenBatch,
)
from serve_app.deployments.model_server import ModelServer
from serve_app.engine.build import EngineCapacity
from serve_app.engine.core import StepCounters
from serve_app.engine.engine import EngineHealth, EngineStats
from serve_app.engine.load import is_news
from serve_app.engine.replies import ReplyStream, deliver

RATE_VARIABLE = "SERVE_APP_PACED_RATE"
"""Tokens per second of each stream."""
_PLACES = 256
_IDS = range(1_000, 3_000)
"""What is made of: pieces of words in the demo model's vocabulary."""
CARD = ModelCard(
    name="paced",
    fingerprint=Fingerprint("paced"),
    context_tokens=8_192,
    kv_capacity_tokens=1_000_000,
    vocab_size=49_152,
    weights_bytes=0,
    kv_cache_bytes=0,
    device="none",
    dtype="none",
    attention_backend="none",
)


class PacedEngine:
    """Has the face of `serve_app.engine.engine.Engine`, and delivers as that does."""

    capacity = EngineCapacity(1_000_000, 0, 8_192, 16, "none", batch_invariant=False)

    def __init__(self, rate: float) -> None:
        self._step_s = 1 / rate
        self._watcher: tuple[asyncio.AbstractEventLoop, Callable[[ReplicaLoad], None]] | None = None
        self._told: ReplicaLoad | None = None
        self._streams: dict[ReplyStream, tuple[GenerationRequest, itertools.count[int]]] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def watch_load(self, tell: Callable[[ReplicaLoad], None]) -> None:
        """Have `tell` called in this event loop with the load, after each tick that changes it."""
        self._watcher = asyncio.get_running_loop(), tell

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Reply, None]:
        """A token each tick."""
        stream = ReplyStream(asyncio.get_running_loop())
        with self._lock:
            self._streams[stream] = (request, itertools.count(len(request.output_token_ids)))
        try:
            while True:
                reply = await stream.take(1.0)
                if isinstance(reply, TokenBatch):
                    yield reply
                    if reply.finish_reason is not None:
                        return
        finally:
            with self._lock:
                self._streams.pop(stream, None)

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stopping.wait(max(0.0, due - time.monotonic())):
            due += self._step_s
            with self._lock:
                replies: list[tuple[ReplyStream, Reply]] = []
                for stream, (request, positions) in list(self._streams.items()):
                    position = next(positions)
                    last = position + 1 == request.max_new_tokens
                    reply = TokenBatch(
                        position,
                        (_IDS[(request.sampling.seed + position) % len(_IDS)],),
                        None,
                        FinishReason.LENGTH if last else None,
                        GenerationStats() if last else None,
                    )
                    replies.append((stream, reply))
                    if last:
                        del self._streams[stream]
                running = len(replies)
            self._tell(running)
            deliver(replies)

    def _tell(self, running: int) -> None:
        load = ReplicaLoad(running, 0, _PLACES, self.capacity.kv_capacity_tokens, 0, running / self._step_s, 0.0)
        if self._watcher is not None and is_news(load, self._told):
            loop, tell = self._watcher
            loop.call_soon_threadsafe(tell, load)
            self._told = load

    def health(self) -> EngineHealth:
        return EngineHealth(alive=True, step_running_s=0.0)

    def stats(self) -> EngineStats:
        return EngineStats(len(self._streams), 0, 0, 1, 0, StepCounters())

    def stop(self) -> None:
        self._stopping.set()


class PacedModelServer(ModelServer):
    """The model server without a model."""

    def _start(
        self,
        config: AppConfig,
        report: Callable[[LoadStage], None],
        before_isolated: Callable[[GenerationRequest], None],
    ) -> tuple[PacedEngine, ModelCard]:  # type: ignore[override]
        return PacedEngine(float(os.environ[RATE_VARIABLE])), CARD


def build(args: AppConfig) -> serve.Application:
    """The application of `serve_app.app`, with that model server in place of its own."""
    serve_app.app.ModelServer = PacedModelServer  # type: ignore[misc]
    return serve_app.app.build(args)
