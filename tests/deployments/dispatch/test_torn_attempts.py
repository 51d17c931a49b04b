"""Attempts that lose their replica while they are on their way to it, or while tokens come through a channel."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from fake_replica import generation_request
from simulated_time import simulated_time

from serve_app.core import Failure, FinishReason, GenerationRequest, Reply, TokenBatch
from serve_app.deployments.dispatch import directory as replica_module
from serve_app.deployments.dispatch import replica_client
from serve_app.deployments.dispatch.directory import ReplicaDirectory, replica_directory
from serve_app.deployments.dispatch.replica_client import RayReplicaClient
from serve_app.generation.attempts import Generation
from serve_app.generation.replica import ReplicaLost

APP = "torn-app"


class Replica:
    """A deployment handle of one replica, whose own way brings `replies`, and then `end`."""

    app_name, deployment_name = APP, "ModelServer"

    def __init__(self, *replies: Reply, end: BaseException | None = None) -> None:
        self._replies, self._end = list(replies), end
        self.opened = asyncio.Event()
        self.goes_on = asyncio.Event()
        self.attempt = 0
        self.cancelled = False
        self.request: GenerationRequest | None = None

    def options(self, **options: Any) -> Replica:
        return self

    def remote(self, request: GenerationRequest) -> Replica:
        replica_directory(APP, "ModelServer").sent(request, "replica-1")
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
        self.cancelled = True


class Cancelled:
    """Serve's part of a call."""

    times = 0

    def cancel(self) -> None:
        self.times += 1


class Doubtless:
    def doubt(self) -> None:
        """Nothing."""


FIRST, SECOND = TokenBatch(0, (100,)), TokenBatch(1, (101,))
LAST = TokenBatch(2, (102,), finish_reason=FinishReason.LENGTH)
AT_ONCE_S = 0.5
"""Less than a heartbeat, and than the silence that a generation waits for."""
Events = Callable[[RayReplicaClient, Replica, ReplicaDirectory], None]


async def attempted(replica: Replica, events: Events, within_s: float = AT_ONCE_S) -> list[Reply]:
    """What an attempt brings that was sent to `replica-1`. `events` happen before anything comes by its own way."""
    client = RayReplicaClient(replica, Doubtless())  # type: ignore[arg-type]

    async def read() -> list[Reply]:
        return [reply async for reply in client.open(generation_request(max_new_tokens=3))]

    with simulated_time():
        reading = asyncio.create_task(read())
        await replica.opened.wait()
        events(client, replica, replica_directory(APP, "ModelServer"))
        async with asyncio.timeout(within_s):
            return await reading


@pytest.fixture(autouse=True)
def _nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_client, "own_name", lambda: "")


def by_channel(*replies: Reply) -> Events:
    """These come through a channel; then the call goes on."""

    def events(client: RayReplicaClient, replica: Replica, table: ReplicaDirectory) -> None:
        client._channels.received("replica-1", [(replica.attempt, reply) for reply in replies])
        replica.goes_on.set()

    return events


@pytest.mark.parametrize("end", [ConnectionResetError(), asyncio.CancelledError()])
async def test_what_broke_is_lost_at_once(end: BaseException) -> None:
    with pytest.raises(ReplicaLost):
        await attempted(Replica(end=end), by_channel(FIRST))


async def test_all_of_an_attempt_comes_through_a_channel_and_its_call_ends_by_itself() -> None:
    replica = Replica()
    assert await attempted(replica, by_channel(FIRST, SECOND, LAST)) == [FIRST, SECOND, LAST]
    assert not replica.cancelled


async def test_the_last_word_may_come_after_the_end_of_the_call() -> None:
    def events(client: RayReplicaClient, replica: Replica, table: ReplicaDirectory) -> None:
        by_channel(FIRST)(client, replica, table)
        loop = asyncio.get_running_loop()
        loop.call_later(
            0.4, client._channels.received, "replica-1", [(replica.attempt, SECOND), (replica.attempt, LAST)]
        )

    assert await attempted(Replica(), events) == [FIRST, SECOND, LAST]


@pytest.mark.parametrize("ways", [by_channel(), by_channel(FIRST)])
async def test_an_end_without_a_last_word_is_a_loss(ways: Events) -> None:
    with pytest.raises(ReplicaLost, match="without a last batch"):
        await attempted(Replica(), ways, within_s=3)


async def test_what_comes_by_the_call_is_not_lost_with_the_channel() -> None:
    def events(client: RayReplicaClient, replica: Replica, table: ReplicaDirectory) -> None:
        replica.goes_on.set()
        broke = client._channels.broke
        asyncio.get_running_loop().call_later(0.1, broke, "replica-1", object())

    assert await attempted(Replica(FIRST, SECOND, LAST), events) == [FIRST, SECOND, LAST]


async def test_an_attempt_that_is_given_up_is_cancelled() -> None:
    replica = Replica()
    with pytest.raises(TimeoutError):
        await attempted(replica, lambda client, replica, table: None)
    assert replica.cancelled


@pytest.mark.parametrize("at_another", ["replica-2", "replica-1", ""])
async def test_what_one_began_is_not_joined_to_what_another_makes(at_another: str) -> None:
    """Serve sends on what it does not know to be taken: its replica had begun it, and died before that was known.

    Or its connection broke, and it is sent there again.
    """

    def events(client: RayReplicaClient, replica: Replica, table: ReplicaDirectory) -> None:
        client._channels.received("replica-1", [(replica.attempt, FIRST)])
        table.died("replica-1")
        if at_another:
            table.sent(replica.request, at_another)
            client._channels.received(at_another, [(replica.attempt, SECOND)])
        replica.goes_on.set()

    with pytest.raises(ReplicaLost, match="another replica had already begun it") as lost:
        await attempted(Replica(SECOND, LAST), events)
    assert lost.value.taken


async def test_one_that_serve_sent_on_is_not_lost_with_the_first_channel() -> None:
    def events(client: RayReplicaClient, replica: Replica, table: ReplicaDirectory) -> None:
        client._channels.broke("replica-1", object())  # type: ignore[arg-type]
        table.died("replica-1")
        table.sent(replica.request, "replica-2")
        assert table.taken(replica.request, "replica-2", Cancelled())
        client._channels.received("replica-1", [(replica.attempt, TokenBatch(0, (99,)))])  # late
        client._channels.received("replica-2", [(replica.attempt, each) for each in (FIRST, SECOND, LAST)])
        replica.goes_on.set()

    assert await attempted(Replica(), events) == [FIRST, SECOND, LAST]


@pytest.mark.parametrize("breaks", [("replica-1", "replica-2"), ("replica-2", "replica-1"), ("replica-1",)])
async def test_each_channel_that_breaks_is_told(breaks: tuple[str, ...]) -> None:
    """Also where several do in one turn, as when the ingress stood still."""

    def events(client: RayReplicaClient, replica: Replica, table: ReplicaDirectory) -> None:
        client._channels.received("replica-1", [(replica.attempt, FIRST)])
        for each in breaks:
            client._channels.broke(each, object())  # type: ignore[arg-type]

    with pytest.raises(ReplicaLost, match="its channel broke"):
        await attempted(Replica(), events)


async def test_one_that_waits_for_the_successor_of_the_last_replica_says_that_it_lives() -> None:
    """Serve looks for no replica while there is none, and names none as waiting."""

    def events(client: RayReplicaClient, replica: Replica, table: ReplicaDirectory) -> None:
        table.died("replica-1")
        asyncio.get_running_loop().call_later(60, replica.goes_on.set)

    *waiting, first, last = await attempted(Replica(TokenBatch(0, (100, 101)), LAST), events, within_s=61)
    assert (first, last) == (TokenBatch(0, (100, 101)), LAST)
    assert 55 < len(waiting) <= 60
    assert set(waiting) == {TokenBatch(0)}


async def test_one_whose_replicas_die_before_they_are_known_to_have_it_is_not_sent_on_for_ever() -> None:
    def events(client: RayReplicaClient, replica: Replica, table: ReplicaDirectory) -> None:
        for dies in ("replica-1", "replica-2"):
            table.sent(replica.request, dies)
            table.died(dies)
        table.sent(replica.request, "replica-3")

    with pytest.raises(ReplicaLost, match="2 replicas died") as lost:
        await attempted(Replica(), events, within_s=5)
    assert lost.value.taken


async def test_a_call_that_is_assigned_while_it_is_given_up_is_cancelled() -> None:
    """Serve's own cancel misses what it has assigned and not looked at yet."""
    replica, table, calls = Replica(), replica_directory(APP, "ModelServer"), [Cancelled(), Cancelled()]
    client = RayReplicaClient(replica, Doubtless())  # type: ignore[arg-type]
    for taken_before in (True, False):
        replies = client.open(generation_request())
        reading = asyncio.ensure_future(anext(replies))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        if taken_before:
            assert table.taken(replica.request, "replica-1", calls[0])
        reading.cancel()
        await asyncio.wait({reading})
        if not taken_before:
            assert not table.taken(replica.request, "replica-1", calls[1]), "whoever asked is to cancel it"
    assert calls[0].times == 1
    assert table.taken(generation_request(), "replica-1", Cancelled()), "what nobody follows is nobody's to cancel"


class Channel:
    """To the only replica, in the client's reader."""

    def __init__(self, client: RayReplicaClient) -> None:
        self._client, self.closed = client, False
        client._channels._channels["replica-1"] = self  # type: ignore[assignment]

    def close(self) -> None:
        self.closed = True
        self._client._channels.broke("replica-1", self)  # type: ignore[arg-type]


class Silence:
    """Generations at one replica which says nothing by itself, in simulated time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loop: Any = asyncio.get_running_loop()
        monkeypatch.setattr(replica_module, "time", SimpleNamespace(monotonic=lambda: self.loop.time()))
        monkeypatch.setattr(replica_module, "_tables", {})
        self.replica = Replica()
        self.client = RayReplicaClient(self.replica, Doubtless())  # type: ignore[arg-type]
        self.table = replica_directory(APP, "ModelServer")
        self.channel = Channel(self.client)

    async def begin(self, **changes: Any) -> tuple[Generation, int]:
        """A generation that has been taken, and the number of its attempt."""
        generation = Generation(self.client, generation_request(max_new_tokens=1000, **changes), asyncio.Event())
        self.replica.opened.clear()
        await generation.__aenter__()
        await self.replica.opened.wait()
        return generation, self.replica.attempt

    async def feed(self, attempt: int, seconds: float) -> None:
        """A token for it each quarter of a second."""
        for index in range(int(4 * seconds)):
            self.client._channels.received("replica-1", [(attempt, TokenBatch(index, (7,)))])
            await asyncio.sleep(0.25)

    def stands_still(self, seconds: float) -> None:
        """The ingress does. What came meanwhile is read before it looks at its timers."""
        now = self.loop.time
        self.loop.time = lambda: now() + seconds


async def test_the_silence_of_one_attempt_condemns_no_replica_that_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated_time():
        silence = Silence(monkeypatch)
        fed, attempt = await silence.begin(request_id="fed")
        silent, another = await silence.begin(request_id="silent")
        await silence.feed(attempt, 6)
        assert silence.replica.attempt > another, "the silent one was asked for again"
        assert not silence.channel.closed
        assert not silence.table.silent("replica-1")
        await fed.aclose()
        await silent.aclose()


async def test_a_replica_that_says_nothing_to_anybody_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated_time():
        silence = Silence(monkeypatch)
        fed, attempt = await silence.begin()
        await silence.feed(attempt, 2)
        await asyncio.sleep(5)
        assert silence.channel.closed
        assert silence.table.silent("replica-1")
        await fed.aclose()


async def test_an_end_while_the_ingress_stood_still_condemns_no_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated_time():
        silence = Silence(monkeypatch)
        fed, attempt = await silence.begin(remaining_s=10.0)
        await silence.feed(attempt, 7)
        silence.loop.call_soon(silence.client._channels.received, "replica-1", [(attempt, TokenBatch(28, (7,)))])
        silence.stands_still(4.5)
        await asyncio.sleep(0.3)
        fed.take()
        assert isinstance(fed.take(), Failure), "its time was over"
        assert not silence.channel.closed
        assert not silence.table.silent("replica-1")
        await fed.aclose()


@pytest.mark.parametrize("stall_s", [2.0, 4.3, 5.2, 30.0])
async def test_one_that_waits_for_a_place_is_not_lost_while_the_ingress_stands_still(
    monkeypatch: pytest.MonkeyPatch, stall_s: float
) -> None:
    with simulated_time():
        silence = Silence(monkeypatch)
        waiting, attempt = await silence.begin()
        silence.table.waiting(silence.replica.request)
        await asyncio.sleep(3.5)
        silence.stands_still(stall_s)
        await asyncio.sleep(8)
        assert silence.replica.attempt == attempt
        await waiting.aclose()
