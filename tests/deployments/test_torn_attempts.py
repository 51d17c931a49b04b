"""Attempts that lose their replica while they are on their way to it, or while tokens come by two ways."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from fake_replica import generation_request
from simulated_time import simulated_time

from serve_app.deployments import replica_client
from serve_app.deployments.replica_client import RayReplicaClient
from serve_app.deployments.replica_table import ReplicaTable, replica_table
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
        self.request: GenerationRequest | None = None

    def options(self, **options: Any) -> Replica:
        return self

    def remote(self, request: GenerationRequest) -> Replica:
        replica_table(APP, "ModelServer").sent(request, "replica-1")
        self.attempt, self.request = request.attempt, request
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


FIRST, SECOND = TokenBatch(0, (100,)), TokenBatch(1, (101,))
LAST = TokenBatch(2, (102,), finish_reason=FinishReason.LENGTH)
AT_ONCE_S = 0.5
"""Less than a heartbeat, and than the silence that a generation waits for."""
Events = Callable[[RayReplicaClient, Replica, ReplicaTable], None]


async def attempted(replica: Replica, events: Events, within_s: float = AT_ONCE_S) -> list[Reply]:
    """What an attempt brings that was sent to `replica-1`. `events` happen before anything comes by its own way."""
    client = RayReplicaClient(replica, Doubtless())  # type: ignore[arg-type]

    async def read() -> list[Reply]:
        return [reply async for reply in client.open(generation_request(max_new_tokens=3))]

    with simulated_time():
        reading = asyncio.create_task(read())
        await replica.opened.wait()
        events(client, replica, replica_table(APP, "ModelServer"))
        async with asyncio.timeout(within_s):
            return await reading


@pytest.fixture(autouse=True)
def _nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_client, "own_name", lambda: "")


def overtakes(client: RayReplicaClient, replica: Replica, table: ReplicaTable) -> None:
    """The second token comes through a channel."""
    client._channels.received("replica-1", [(replica.attempt, SECOND)])
    replica.goes_on.set()


@pytest.mark.parametrize("end", [ConnectionResetError(), asyncio.CancelledError()])
async def test_what_broke_is_lost_at_once(end: BaseException) -> None:
    with pytest.raises(ReplicaLost):
        await attempted(Replica(end=end), overtakes)


async def test_what_comes_is_put_in_order() -> None:
    assert await attempted(Replica(FIRST, LAST), overtakes) == [FIRST, SECOND, LAST]


@pytest.mark.parametrize("at_another", [True, False])
async def test_what_one_began_is_not_joined_to_what_another_makes(at_another: bool) -> None:
    """Serve sends on what it does not know to be taken: its replica had begun it, and died before that was known."""

    def events(client: RayReplicaClient, replica: Replica, table: ReplicaTable) -> None:
        client._channels.received("replica-1", [(replica.attempt, FIRST)])
        table.died("replica-1")
        if at_another:
            table.sent(replica.request, "replica-2")
            client._channels.received("replica-2", [(replica.attempt, SECOND)])
        replica.goes_on.set()

    with pytest.raises(ReplicaLost, match="replica-1 had begun it") as lost:
        await attempted(Replica(SECOND, LAST), events)
    assert lost.value.taken


async def test_one_that_serve_sent_on_is_not_lost_with_the_first_channel() -> None:
    def events(client: RayReplicaClient, replica: Replica, table: ReplicaTable) -> None:
        client._channels.broke("replica-1", object())  # type: ignore[arg-type]
        table.died("replica-1")
        table.sent(replica.request, "replica-2")
        table.taken(replica.request, "replica-2")
        client._channels.received("replica-2", [(replica.attempt, SECOND)])
        replica.goes_on.set()

    assert await attempted(Replica(FIRST, LAST), events) == [FIRST, SECOND, LAST]


async def test_one_that_waits_for_the_successor_of_the_last_replica_says_that_it_lives() -> None:
    """Serve looks for no replica while there is none, and names none as waiting."""

    def events(client: RayReplicaClient, replica: Replica, table: ReplicaTable) -> None:
        table.died("replica-1")
        asyncio.get_running_loop().call_later(60, replica.goes_on.set)

    *waiting, first, last = await attempted(Replica(TokenBatch(0, (100, 101)), LAST), events, within_s=61)
    assert (first, last) == (TokenBatch(0, (100, 101)), LAST)
    assert 55 < len(waiting) <= 60
    assert set(waiting) == {TokenBatch(0)}


async def test_one_whose_replicas_die_before_they_are_known_to_have_it_is_not_sent_on_for_ever() -> None:
    def events(client: RayReplicaClient, replica: Replica, table: ReplicaTable) -> None:
        for dies in ("replica-1", "replica-2"):
            table.sent(replica.request, dies)
            table.died(dies)
        table.sent(replica.request, "replica-3")

    with pytest.raises(ReplicaLost, match="2 died") as lost:
        await attempted(Replica(), events, within_s=5)
    assert lost.value.taken
