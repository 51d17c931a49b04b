"""Which replicas a request may go to, as a function of what they say of themselves: no Ray needed."""

from __future__ import annotations

import asyncio
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
from fake_model_server import CARD, request
from msgspec.structs import replace
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve._private.request_router.common import ReplicaQueueLengthCache

from serve_app.deployments.dispatch.directory import ReplicaDirectory
from serve_app.deployments.dispatch.places import Places
from serve_app.deployments.dispatch.router import FINGERPRINT_KEY, NUMERICS_KEY, ModelRouter

OURS = CARD.fingerprint


def replica(name: str, fingerprint: str = OURS, numerics_id: str = "") -> Any:
    metadata = {FINGERPRINT_KEY: fingerprint, NUMERICS_KEY: numerics_id}
    return SimpleNamespace(replica_id=ReplicaID(name, DeploymentID("ModelServer")), replica_metadata=metadata)


def router_of(*replicas: Any) -> ModelRouter:
    """A router without Serve that knows these replicas, of two places each."""
    router = ModelRouter.__new__(ModelRouter)
    router._directory = ReplicaDirectory()
    router._places = Places(router._directory.admission)
    router._replica_queue_len_cache = ReplicaQueueLengthCache()
    router._replicas = {each.replica_id: each for each in replicas}
    router._places.update({each.replica_id.unique_id: 2 for each in replicas})
    return router


def pending(asked: Any, key: str = "1", created_at: float = 0.0) -> Any:
    return SimpleNamespace(
        args=[asked],
        routing_context=SimpleNamespace(should_backoff=False),
        metadata=SimpleNamespace(internal_request_id=key),
        created_at=created_at,
        future=asyncio.get_running_loop().create_future(),
    )


async def chosen(asked: Any, *replicas: Any, silent: str = "") -> set[str]:
    """All that may be chosen, over many draws."""
    router = router_of(*replicas)
    if silent:
        assert router._directory.fell_silent(silent, 4)
    names: set[str] = set()
    for _ in range(50):
        ((replica,),) = await router.choose_replicas(list(replicas), pending(asked))
        names.add(replica.replica_id.unique_id)
        router._places.completed("1")
    return names


A, B, OTHER = replica("a", numerics_id="x"), replica("b", numerics_id="y"), replica("c", "other", "x")


@pytest.mark.parametrize(
    ("numerics_id", "replicas", "expected"),
    [
        ("", (A, B, OTHER), {"a", "b"}),
        ("x", (A, B, OTHER), {"a"}),
        ("x", (B, OTHER), {"b"}),
        ("x", (OTHER,), {"c"}),
    ],
)
async def test_weights_come_first_and_then_how_it_computes(
    numerics_id: str, replicas: tuple[Any, ...], expected: set[str]
) -> None:
    assert await chosen(replace(request(), numerics_id=numerics_id), *replicas) == expected


async def test_going_on_matters_more_than_the_last_bit() -> None:
    assert await chosen(replace(request(), numerics_id="x"), A, B, silent="a") == {"b"}


async def test_what_replicas_are_full_for_waits_at_none_and_what_has_begun_goes_before_what_has_not() -> None:
    router = router_of(A)
    new, newer, begun = request(), request(), replace(request(), output_token_ids=(1, 2))
    filling = [pending(request(), f"filling {number}") for number in range(2)]
    for each in filling:
        await router.choose_replicas([A], each)
    with router._directory.track(new) as attempt:
        router._directory.sent(new, "a")  # which rejected it
        came: list[str] = []
        tasks = []
        for created_at, (name, asked) in enumerate([("new", new), ("newer", newer), ("begun", begun)]):
            tasks.append(asyncio.create_task(router.choose_replicas([A], pending(asked, name, created_at))))
            tasks[-1].add_done_callback(lambda _, name=name: came.append(name))
            await asyncio.sleep(0)
        assert attempt.replica is None, "so that it says that it lives, and nobody takes it for silent"
        for left in ("filling 0", "filling 1", "begun"):
            router.on_request_completed(A.replica_id, left)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        await asyncio.wait(tasks, timeout=60)
    assert came == ["begun", "new", "newer"]


async def test_a_request_that_is_given_up_between_its_choice_and_its_way_holds_no_place() -> None:
    router = router_of(A)
    given_up = [pending(request(), f"given up {number}") for number in range(2)]
    for each in given_up:
        await router.choose_replicas([A], each)
        each.future.cancel()
    async with asyncio.timeout(60):
        assert await router.choose_replicas([A], pending(request(), "another")) == [[A]]


async def test_there_is_a_task_of_serves_for_each_request_that_waits() -> None:
    router = router_of(A)
    router._pending_requests_to_fulfill = deque([pending(request(), str(number)) for number in range(144)])
    assert router.target_num_routing_tasks == 144


async def test_serve_asks_no_replica_that_is_known_to_have_room() -> None:
    """It asks one of which it has heard nothing for 10 s, before each request of a burst."""
    router = router_of(A)
    await router.choose_replicas([A], pending(request()))
    assert router.replica_queue_len_cache.get(A.replica_id) is not None
