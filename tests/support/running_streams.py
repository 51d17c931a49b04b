"""Streams of a fake model server that run while a test does something to its replicas."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
from fake_model_server import expected_tokens, request
from msgspec.structs import replace
from ray import serve

from serve_app.config import AppConfig
from serve_app.core import Failure, Reply, TokenBatch
from serve_app.deployments.dispatch.replica_client import RayReplicaClient
from serve_app.deployments.status.progress import ProgressBoard
from serve_app.deployments.status.readiness import Readiness
from serve_app.generation.attempts import Generation, interleave


class Service:
    """A deployment in some state, and streams of it."""

    def __init__(self, app_name: str) -> None:
        self.handle = serve.get_deployment_handle("ModelServer", app_name)
        readiness = Readiness(ProgressBoard(app_name, AppConfig()), app_name, "ModelServer", may_sleep=False)
        self.client = RayReplicaClient(self.handle, readiness)

    async def each(self, method: str) -> set[Any]:
        """What each replica answers."""
        await self.handle.pid.remote()  # a new handle knows no replica yet
        return set(await self.handle.broadcast(method).results_async())

    async def running(self) -> dict[int, int]:
        """Process of each replica -> how many requests it computes."""
        return dict(await self.each("where"))

    def start(self, streams: int, tokens: int) -> list[Stream]:
        return [Stream(self.client, seed, tokens) for seed in range(streams)]


_numbers = count()


class Stream:
    """One generation, read to its end by a task."""

    def __init__(self, client: RayReplicaClient, seed: int, tokens: int) -> None:
        self.id = f"stream-{next(_numbers)}"
        self.expected = expected_tokens(seed, tokens)
        self.tokens: list[int] = []
        self.failure: Failure | None = None
        self.longest_pause_s = 0.0
        wanted = replace(request(tokens=tokens, seed=seed), request_id=self.id)
        self.done = asyncio.create_task(self._read(client, wanted))

    async def _read(self, client: RayReplicaClient, wanted: Any) -> None:
        changed = asyncio.Event()
        async with Generation(client, wanted, changed) as generation:
            heard = time.monotonic()
            async for _, reply in interleave({0: generation}, changed):
                self._take(reply, time.monotonic() - heard)
                heard = time.monotonic()

    def _take(self, reply: Reply, pause_s: float) -> None:
        if isinstance(reply, TokenBatch):
            if self.tokens:
                self.longest_pause_s = max(self.longest_pause_s, pause_s)
            self.tokens += reply.token_ids
        else:
            self.failure = reply


async def flowing(streams: list[Stream]) -> None:
    """Until each has its first tokens. One that fails before fails the test."""
    await until(lambda: all(len(s.tokens) > 3 or s.done.done() for s in streams))
    assert all(len(s.tokens) > 3 for s in streams), [s.failure for s in streams]


async def going_on(streams: list[Stream]) -> None:
    """Until each has some more tokens than now."""
    before = [len(stream.tokens) for stream in streams]
    await until(lambda: all(len(s.tokens) > known + 5 for s, known in zip(streams, before, strict=True)))


async def until(condition: Callable[[], bool]) -> None:
    """Ask until it holds; what a slow machine takes a minute for is given up."""
    async with asyncio.timeout(180):
        while not condition():  # noqa: ASYNC110 - of what other processes do
            await asyncio.sleep(0.02)


def moves(caplog: pytest.LogCaptureFixture, streams: list[Stream]) -> list[int]:
    """How often each left a replica that was going; what was logged at level WARNING says so."""
    left = [str(record.args[0]) for record in caplog.records if record.args and "is leaving" in record.getMessage()]
    counted = Counter(left)
    return [counted[stream.id] for stream in streams]
