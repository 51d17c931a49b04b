"""Many more requests than the replicas have places, on real Serve replicas: what their waiting costs."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from fake_model_server import FakeModelServer, expected_tokens, request
from ray import serve
from ray.serve.request_router import RunningReplica

from serve_app.config import AppConfig
from serve_app.core import TokenBatch
from serve_app.deployments.dispatch.directory import ReplicaDirectory
from serve_app.deployments.dispatch.replica_client import RayReplicaClient
from serve_app.deployments.status.progress import ProgressBoard
from serve_app.deployments.status.readiness import Readiness
from serve_app.generation.attempts import Generation, interleave

pytestmark = pytest.mark.ray

APP = "waiting"
PLACES = 4
STREAMS = 40
TOKENS = 60
"""Of 10 ms each: the last streams wait for 6 s, which is longer than a silent replica is waited for."""


def count_calls(counted: Counter[str], monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
    original: Callable[..., Any] = getattr(owner, name)

    def counting(*args: Any, **kwargs: Any) -> Any:
        counted[name] += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counting)


async def test_waiting_for_a_place_sends_nothing_and_is_no_silence(
    deployed: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()
    count_calls(calls, monkeypatch, ReplicaDirectory, "sent")
    count_calls(calls, monkeypatch, ReplicaDirectory, "track")
    count_calls(calls, monkeypatch, RunningReplica, "get_queue_len")
    deployment = serve.deployment(FakeModelServer).options(
        name="ModelServer",
        num_replicas=2,
        max_ongoing_requests=PLACES // 2,
        ray_actor_options={"num_cpus": 0.1},
        graceful_shutdown_timeout_s=1,
        graceful_shutdown_wait_loop_s=0.1,
        request_router_config={"request_router_class": "serve_app.deployments.dispatch.router.ModelRouter"},
    )
    deployed(deployment.bind(AppConfig()), APP)
    readiness = Readiness(ProgressBoard(APP, AppConfig()), APP, "ModelServer", may_sleep=False)
    client = RayReplicaClient(serve.get_deployment_handle("ModelServer", APP), readiness, max_wait_s=600)
    changed = asyncio.Event()
    got: list[list[int]] = [[] for _ in range(STREAMS)]
    async with AsyncExitStack() as stack:
        asked = [request(tokens=TOKENS, seed=seed) for seed in range(STREAMS)]
        generations = [await stack.enter_async_context(Generation(client, one, changed)) for one in asked]
        async for position, reply in interleave(dict(enumerate(generations)), changed):
            assert isinstance(reply, TokenBatch)
            got[position] += reply.token_ids
    assert got == [expected_tokens(seed, TOKENS) for seed in range(STREAMS)]
    assert calls["track"] == STREAMS, "attempts: none was given up"
    # A replica gives a place back a moment after we know of the end: now and then one comes too early.
    assert calls["sent"] <= STREAMS + STREAMS // 4
    assert calls["get_queue_len"] <= STREAMS, "at most once for each that comes to its turn"
