"""The journal actor: started when needed, found by all, gone and there again; the rules are those of every store."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest
import ray

from serve_app.deployments.journal_actor import NAMESPACE, VERSION, RayJournalStore
from serve_app.resume.journal_store import (
    Append,
    AppendResult,
    JournalLimits,
    LeaseAction,
    LeaseStatus,
    StoreUnavailable,
)

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]
LIMITS = JournalLimits(lease_s=60)
"""Which no test outlasts."""


@pytest.fixture
def app_name() -> Iterator[str]:
    """Of an application that has an actor of its own, which is taken away."""
    name = secrets.token_hex(4)
    yield name
    with suppress(ValueError):  # the test needed none
        ray.kill(actor_of(name))


def actor_of(app_name: str) -> ray.actor.ActorHandle:
    return ray.get_actor(f"journals of {app_name}, version {VERSION}", namespace=NAMESPACE)


def add(position: int, *records: bytes, action: LeaseAction = LeaseAction.HOLD) -> list[Append]:
    return [Append("s", "a", position, records, action)]


async def test_reading_starts_no_actor(app_name: str) -> None:
    store = RayJournalStore(app_name, LIMITS)
    assert await store.read("s", 0) is None
    assert not await store.acquire("s", "a")
    assert await store.size() == (0, 0)
    with pytest.raises(ValueError, match="journals"):
        actor_of(app_name)


async def test_what_one_ingress_writes_another_reads(app_name: str) -> None:
    one, other = RayJournalStore(app_name, LIMITS), RayJournalStore(app_name, LIMITS)
    assert await one.create("s", "a", b"doc") is LeaseStatus.HELD
    (result,) = await one.append(add(0, b"one"))
    assert result.lease is LeaseStatus.HELD
    view = await other.read("s", 0)
    assert view is not None
    assert (view.document, view.records, view.leased) == (b"doc", (b"one",), True)
    assert not await other.acquire("s", "b")
    waiting = asyncio.create_task(other.read("s", 1, wait_s=5))
    await asyncio.sleep(0.05)
    await one.append(add(1, b"two"))
    view = await waiting
    assert view is not None
    assert view.records == (b"two",)
    await one.append(add(2, action=LeaseAction.RELEASE))
    assert await other.acquire("s", "b")
    assert ray.get(actor_of(app_name).size.remote()) == (1, 9)


async def test_an_actor_that_died_is_replaced_by_an_empty_one(app_name: str) -> None:
    store = RayJournalStore(app_name, LIMITS)
    await store.create("s", "a", b"doc")
    ray.kill(actor_of(app_name))
    deadline = time.monotonic() + 120
    result = AppendResult(LeaseStatus.HELD)
    while result.lease is LeaseStatus.HELD:  # the old one lives a moment longer
        assert time.monotonic() < deadline
        with suppress(StoreUnavailable):  # Ray still gives out the name of the dead one
            (result,) = await store.append(add(0, b"one"))
        await asyncio.sleep(0.01)
    assert result.lease is LeaseStatus.GONE
    assert await store.create("s", "a", b"doc") is LeaseStatus.HELD


async def test_limits_are_those_of_the_latest_config(app_name: str) -> None:
    one = RayJournalStore(app_name, LIMITS)
    await one.create("s", "a", b"document")
    other = RayJournalStore(app_name, JournalLimits(max_bytes=5))
    await other.create("t", "a", b"")
    assert await one.create("u", "a", b"document") is LeaseStatus.FULL


async def test_many_readers_wait_at_a_time(app_name: str) -> None:
    store = RayJournalStore(app_name, LIMITS)
    await store.create("s", "a", b"doc")
    readers = [asyncio.create_task(store.read("s", 0, wait_s=600)) for _ in range(1200)]
    await asyncio.sleep(0.5)
    async with asyncio.timeout(120):  # it does not wait for readers to give up
        await store.append(add(0, b"one"))
        views = await asyncio.gather(*readers)
    assert all(view is not None and view.records == (b"one",) for view in views)
