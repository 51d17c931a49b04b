"""The replica client against real Serve replicas that die, cancel, raise, end early and are full."""

from __future__ import annotations

import asyncio
import os
import signal
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import replace

import pytest
from fake_model_server import CARD, Deed, FakeModelServer, expected_tokens, request
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from serve_app.config import AppConfig
from serve_app.core import Failure, FailureCode, FinishReason, LoadStage, Reply, TokenBatch
from serve_app.deployments.dispatch import replica_client
from serve_app.deployments.dispatch.channel_wire import ChannelAddress
from serve_app.deployments.dispatch.replica_client import RayReplicaClient
from serve_app.deployments.status.progress import ProgressBoard
from serve_app.deployments.status.readiness import Readiness
from serve_app.generation.attempts import Generation, interleave
from serve_app.generation.replica import WAITING, ReplicaLost, Waiting

pytestmark = pytest.mark.ray

APP = "replica-client"
LONG = 100_000
"""Tokens: a quarter of an hour."""


@pytest.fixture(scope="module")
def handle(deployed: Callable[..., str]) -> DeploymentHandle:
    """Two replicas of the fake model server, which are soon full."""
    return deploy(deployed, max_ongoing_requests=4, max_queued_requests=2)


@pytest.fixture(scope="module")
def roomy(handle: DeploymentHandle, deployed: Callable[..., str]) -> DeploymentHandle:
    """The same with room for more. After the tests of the other, in whose place it comes."""
    return deploy(deployed, max_ongoing_requests=20)


def deploy(deployed: Callable[..., str], **limits: int) -> DeploymentHandle:
    deployment = serve.deployment(FakeModelServer).options(
        name="ModelServer",
        num_replicas=2,
        **limits,
        ray_actor_options={"num_cpus": 0.1},
        health_check_period_s=1,
        graceful_shutdown_timeout_s=1,
        graceful_shutdown_wait_loop_s=0.1,
        request_router_config={"request_router_class": "serve_app.deployments.dispatch.router.ModelRouter"},
    )
    deployed(deployment.bind(AppConfig()), APP)
    return serve.get_deployment_handle("ModelServer", APP)


def client_of(handle: DeploymentHandle, *, may_sleep: bool = False) -> RayReplicaClient:
    readiness = Readiness(ProgressBoard(APP, AppConfig()), APP, "ModelServer", may_sleep=may_sleep)
    return RayReplicaClient(handle, readiness)


async def read(client: RayReplicaClient, deed: Deed) -> list[Reply | Waiting]:
    async with aclosing(client.open(request(deed))) as replies:
        return [reply async for reply in replies]


def ids(replies: Sequence[Reply | Waiting]) -> list[int]:
    return [token for reply in replies if isinstance(reply, TokenBatch) for token in reply.token_ids]


async def all_replicas_run(handle: DeploymentHandle) -> None:
    """Until Serve has replaced what a test killed. Its status may still count what has died: the router must agree."""
    async with asyncio.timeout(120):
        while True:
            with suppress(RayError, RayServeException):  # of one that is dead and not yet known to be
                if await _up(handle) and len(set(await handle.broadcast("pid").results_async())) == 2:
                    return
            await asyncio.sleep(0.1)


async def running(handle: DeploymentHandle) -> int:
    return sum(await handle.broadcast("running").results_async())


async def nothing_runs(handle: DeploymentHandle) -> None:
    """Long before the answers would be over by themselves."""
    async with asyncio.timeout(60):
        while await running(handle):  # noqa: ASYNC110 - of what other processes do
            await asyncio.sleep(0.01)


async def test_a_stream_to_its_end(handle: DeploymentHandle) -> None:
    replies = await read(client_of(handle), Deed.NOTHING)
    assert ids(replies) == expected_tokens(7, 6)
    assert isinstance(replies[-1], TokenBatch)
    assert replies[-1].finish_reason is FinishReason.LENGTH


async def test_the_card_is_known(handle: DeploymentHandle) -> None:
    assert await client_of(handle).model() == CARD


@pytest.mark.parametrize("deed", [Deed.CANCELLED, Deed.ENDS])
async def test_a_replica_that_drops_a_stream_is_lost(handle: DeploymentHandle, deed: Deed) -> None:
    with pytest.raises(ReplicaLost):
        await read(client_of(handle), deed)


async def test_an_exception_in_the_replica_is_a_failure(handle: DeploymentHandle) -> None:
    replies = await read(client_of(handle), Deed.RAISES)
    assert isinstance(replies[-1], Failure)
    assert replies[-1].code is FailureCode.ENGINE_FAILED
    assert "ZeroDivision" not in replies[-1].message


async def test_a_killed_replica_is_lost_at_once(handle: DeploymentHandle) -> None:
    async with asyncio.timeout(30):
        with pytest.raises(ReplicaLost):
            await read(client_of(handle), Deed.KILLED)
    await all_replicas_run(handle)


async def test_a_killed_replica_does_not_change_the_answer(handle: DeploymentHandle) -> None:
    client = client_of(handle)
    changed = asyncio.Event()
    tokens: list[int] = []
    async with Generation(client, request(Deed.KILLED, tokens=12), changed) as generation:
        async for _, reply in interleave({0: generation}, changed):
            assert isinstance(reply, TokenBatch)
            tokens += reply.token_ids
    assert tokens == expected_tokens(7, 12)
    await all_replicas_run(handle)


async def test_closing_cancels_the_work(handle: DeploymentHandle) -> None:
    async with aclosing(client_of(handle).open(request(tokens=LONG))) as replies:
        async for _ in replies:
            assert await running(handle) == 1
            break
    await nothing_runs(handle)


async def test_cancelling_the_reader_cancels_the_work(handle: DeploymentHandle) -> None:
    started = asyncio.Event()

    async def reader() -> None:
        async with aclosing(client_of(handle).open(request(tokens=LONG))) as replies:
            async for _ in replies:
                started.set()

    task = asyncio.create_task(reader())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await nothing_runs(handle)


async def test_a_waiting_request_says_that_it_lives_and_one_too_many_is_refused(handle: DeploymentHandle) -> None:
    client = client_of(handle)
    streams = [client.open(request(tokens=LONG)) for _ in range(8)]
    # One after the other: Serve counts a request as queued until it has found its replica.
    assert [ids([await anext(stream)]) for stream in streams] == [expected_tokens(7, 1)] * 8
    waiting = [client.open(request(tokens=4)) for _ in range(2)]
    assert [await anext(stream) for stream in waiting] == [WAITING, WAITING]
    [refused] = await read(client, Deed.NOTHING)
    assert isinstance(refused, Failure)
    assert refused.code is FailureCode.OVERLOADED
    assert refused.retry_after_s
    for stream in streams:
        await stream.aclose()
    for stream in waiting:
        assert ids([reply async for reply in stream]) == expected_tokens(7, 4)


async def test_an_ill_replica_is_replaced(handle: DeploymentHandle) -> None:
    before = set(await handle.broadcast("pid").results_async())
    await handle.fall_ill.remote()
    until = time.monotonic() + 120
    while time.monotonic() < until:
        with suppress(RayError, RayServeException):  # Serve may end the ill one between two calls
            pids = set(await handle.broadcast("pid").results_async()) if await _up(handle) else before
            if len(pids - before) == 1 and len(pids) == 2:
                return
        await asyncio.sleep(0.2)
    raise AssertionError("the replica was not replaced")


async def _up(handle: DeploymentHandle) -> bool:
    states = (await asyncio.to_thread(serve.status)).applications[APP].deployments["ModelServer"].replica_states
    return states == {"RUNNING": 2}


async def test_no_application_is_no_model(handle: DeploymentHandle) -> None:
    readiness = Readiness(ProgressBoard("nowhere", AppConfig()), "nowhere", "ModelServer", may_sleep=False)
    assert isinstance(await readiness.model(), LoadStage)


@pytest.fixture
async def named_client(roomy: DeploymentHandle, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[RayReplicaClient]:
    """As in an ingress replica: one that has channels to the replicas that answer it."""
    name = f"caller {uuid.uuid4()}"
    monkeypatch.setattr(replica_client, "own_name", lambda: name)
    client = client_of(roomy)
    yield client
    for replica in list(client._channels._channels):
        client._channels.drop(replica)


async def answers(client: RayReplicaClient, streams: int, tokens: int, meanwhile: Callable[[], None]) -> None:
    """Checks that each of several generations brings its own tokens; `meanwhile` is called when all flow."""
    changed = asyncio.Event()
    asked = [request(tokens=tokens, seed=seed) for seed in range(streams)]
    got: list[list[int]] = [[] for _ in asked]
    async with AsyncExitStack() as stack:
        generations = [await stack.enter_async_context(Generation(client, one, changed)) for one in asked]
        async for position, reply in interleave(dict(enumerate(generations)), changed):
            assert isinstance(reply, TokenBatch)
            before = min(map(len, got))
            got[position] += reply.token_ids
            if before < 10 <= min(map(len, got)):
                meanwhile()
    assert got == [expected_tokens(seed, tokens) for seed in range(streams)]


async def messages(roomy: DeploymentHandle) -> int:
    return sum(await roomy.broadcast("messages").results_async())


async def test_streams_at_one_replica_share_messages(roomy: DeploymentHandle, named_client: RayReplicaClient) -> None:
    before = await messages(roomy)
    readers: list[int] = []
    await answers(named_client, 5, 60, lambda: readers.append(len(named_client._channels._channels)))
    assert readers
    assert 1 <= readers[0] <= 2
    assert 0 < await messages(roomy) - before < 5 * 60


async def test_streams_go_on_when_their_channel_breaks(roomy: DeploymentHandle, named_client: RayReplicaClient) -> None:
    torn: list[str] = []

    def tear() -> None:
        for replica in list(named_client._channels._channels):
            named_client._channels.drop(replica)
            torn.append(replica)

    await answers(named_client, 5, 60, tear)
    assert torn, "there was no channel"


async def test_streams_go_on_when_the_replica_of_their_channel_is_killed(
    roomy: DeploymentHandle, named_client: RayReplicaClient
) -> None:
    pids = await roomy.broadcast("pid").results_async()
    channels: list[int] = []

    def kill() -> None:
        channels.append(len(named_client._channels._channels))
        os.kill(pids[0], signal.SIGKILL)

    await answers(named_client, 5, 60, kill)
    assert channels
    assert channels[0] >= 1, "there was no channel"
    await all_replicas_run(roomy)


async def test_a_channel_that_can_not_be_had_is_done_without(
    named_client: RayReplicaClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = named_client._channels._address_of
    asked: list[str] = []

    def another(replica: str) -> ChannelAddress | None:
        asked.append(replica)
        return replace(address, secret="another") if (address := own(replica)) else None

    monkeypatch.setattr(named_client._channels, "_address_of", another)
    await answers(named_client, 5, 60, lambda: None)
    assert asked
    assert named_client._channels._channels == {}
