"""An attempt that waits for a place: what its caller hears, when it is refused, and what it leaves behind. No Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest
from fake_replica import generation_request
from simulated_time import simulated_time

from serve_app.access.admission import MOST_SHARE
from serve_app.core import Failure, FailureCode, SamplingParams, TokenBatch
from serve_app.deployments.dispatch import replica_client
from serve_app.deployments.dispatch.directory import ReplicaDirectory, _tables
from serve_app.deployments.dispatch.replica_client import RayReplicaClient
from serve_app.generation.replica import WAITING

APP = "waiting-app"
MAX_WAIT_S = 10.0


class FullReplica:
    """A deployment handle of replicas that are all full: its calls never get to one."""

    app_name, deployment_name = APP, "ModelServer"

    def __init__(self) -> None:
        self.calls = 0
        self.cancelled = 0

    def options(self, **options: Any) -> FullReplica:
        return self

    def remote(self, request: object) -> FullReplica:
        self.calls += 1
        return self

    def __aiter__(self) -> FullReplica:
        return self

    async def __anext__(self) -> None:
        await asyncio.get_running_loop().create_future()

    def cancel(self) -> None:
        self.cancelled += 1


class Doubtless:
    def doubt(self) -> None: ...


@pytest.fixture
async def client(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[RayReplicaClient]:
    """In front of one replica with one place, which somebody has, and the spare one."""
    monkeypatch.setattr(replica_client, "own_name", lambda: "")
    with simulated_time():
        directory = _tables[APP, "ModelServer"] = ReplicaDirectory()
        made = RayReplicaClient(FullReplica(), Doubtless(), MAX_WAIT_S)  # type: ignore[arg-type]
        admission = directory.admission
        admission._clock = asyncio.get_running_loop().time
        admission.capacity.configure(1, shared=False)
        admission.update({"a": 256})
        for _ in range(2):
            admission.place(admission.stray(request()), "a")
        yield made
        assert not admission.turns, "nothing waits any more"
        assert len(admission._entries) == 2
        del _tables[APP, "ModelServer"]


def request(**changes: object) -> Any:
    return generation_request(**{"max_new_tokens": 50, "sampling": SamplingParams(seed=1), **changes})


async def test_it_says_that_it_waits_and_is_refused_in_the_end(client: RayReplicaClient) -> None:
    loop = asyncio.get_running_loop()
    began, said = loop.time(), []
    async with aclosing(client.open(request())) as replies:
        async for reply in replies:
            said.append((round(loop.time() - began, 1), reply))
    *waits, (at_s, refusal) = said
    assert waits == [(float(second), WAITING) for second in range(1, 9)], "once a second: its generation lives"
    assert at_s == pytest.approx(MAX_WAIT_S * MOST_SHARE, abs=0.1)
    assert isinstance(refusal, Failure)
    assert refusal.code is FailureCode.OVERLOADED
    assert refusal.retry_after_s is not None
    assert client._generate.cancelled == 1, "its call waits no longer either"  # type: ignore[attr-defined]


async def test_one_that_would_wait_too_long_costs_no_call(client: RayReplicaClient) -> None:
    replies = [reply async for reply in client.open(request(remaining_s=1.0))]
    assert [reply.code for reply in replies if isinstance(reply, Failure)] == [FailureCode.OVERLOADED]
    assert len(replies) == 1
    assert client._generate.calls == 0  # type: ignore[attr-defined]
    assert client.refusal("", 1.0, 1.0) is not None
    assert client.refusal("", 1.0, 60.0) is None


async def test_one_that_was_accepted_hears_that_it_lives_for_as_long_as_it_wants(client: RayReplicaClient) -> None:
    async with aclosing(client.open(request(accepted=True))) as replies:
        said = [await anext(replies) for _ in range(60)]
    assert said == [TokenBatch(0)] * 60


async def test_while_there_is_no_replica_nobody_is_refused(client: RayReplicaClient) -> None:
    client._admission.update({})
    async with aclosing(client.open(request())) as replies:
        said = [await anext(replies) for _ in range(60)]
    assert said == [TokenBatch(0)] * 60
