"""An attempt whose first tokens, which come by its own way, are lost with their replica, while a channel has brought
later ones: it fails over at once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fake_replica import generation_request

from serve_app.deployments import replica_client
from serve_app.deployments.replica_client import RayReplicaClient
from serve_app.deployments.replica_table import replica_table
from serve_app.messages import FinishReason, GenerationRequest, Reply, TokenBatch
from serve_app.streams.replica import ReplicaLost

APP = "torn-app"


class Replica:
    """A deployment handle of one replica, whose own way brings `replies`, and then `end`."""

    app_name, deployment_name = APP, "ModelServer"

    def __init__(self, *replies: Reply, end: BaseException | None = None) -> None:
        self._replies, self._end = list(replies), end
        self.opened = asyncio.Event()
        self.goes_on = asyncio.Event()
        self.attempt = 0

    def options(self, **options: Any) -> Replica:
        return self

    def remote(self, request: GenerationRequest) -> Replica:
        replica_table(APP, "ModelServer").sent(request, "replica-1")
        self.attempt = request.attempt
        self.opened.set()
        return self

    def __aiter__(self) -> Replica:
        return self

    async def __anext__(self) -> Reply:
        await self.goes_on.wait()
        if self._replies:
            return self._replies.pop(0)
        raise self._end or StopAsyncIteration

    def cancel(self) -> None:
        """Nothing runs elsewhere."""


class Doubtless:
    def doubt(self) -> None:
        """Nothing."""


async def overtaken(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> list[Reply]:
    """What an attempt brings whose second token comes through a channel, before all that comes by its own way."""
    monkeypatch.setattr(replica_client, "own_name", lambda: "")
    client = RayReplicaClient(replica, Doubtless())  # type: ignore[arg-type]

    async def read() -> list[Reply]:
        return [reply async for reply in client.open(generation_request(max_new_tokens=3))]

    reading = asyncio.create_task(read())
    await replica.opened.wait()
    client._channels.received([(replica.attempt, TokenBatch(1, (101,)))])
    replica.goes_on.set()
    async with asyncio.timeout(0.5):  # less than a heartbeat, and than the silence that a generation waits for
        return await reading


@pytest.mark.parametrize("end", [ConnectionResetError(), asyncio.CancelledError()])
async def test_what_broke_is_lost_at_once(monkeypatch: pytest.MonkeyPatch, end: BaseException) -> None:
    with pytest.raises(ReplicaLost):
        await overtaken(Replica(end=end), monkeypatch)


async def test_what_comes_is_put_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    first, last = TokenBatch(0, (100,)), TokenBatch(2, (102,), finish_reason=FinishReason.LENGTH)
    assert await overtaken(Replica(first, last), monkeypatch) == [first, TokenBatch(1, (101,)), last]
