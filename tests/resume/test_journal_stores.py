"""The rules of a journal store, for each that there is: in memory, and in a real Redis."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from unittest.mock import AsyncMock

import pytest
from journal_stores import loop_time
from redis.asyncio import Redis
from redis.asyncio.cluster import RedisCluster
from redis.exceptions import ResponseError
from redis_server import redis_cluster, redis_server
from simulated_time import simulated_time

from serve_app.resume.journal_store import (
    Append,
    JournalLimits,
    JournalStore,
    LeaseAction,
    LeaseStatus,
    StoreUnavailable,
)
from serve_app.resume.memory_store import MemoryJournals, MemoryJournalStore
from serve_app.resume.redis_store import RedisJournalStore
from serve_app.resume.stream_id import new_stream_id

MakeStore = Callable[..., JournalStore]
RedisClient = Redis | RedisCluster
LEASE_S = 2.0
"""Where a test waits for its end. Redis has a clock of its own, so a stall of the machine must be shorter."""
NEVER_S = 600.0
"""A lease that no test outlasts."""


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    with redis_server() as url:
        yield url


@pytest.fixture(scope="module")
def cluster_url() -> Iterator[str]:
    with redis_cluster() as urls:
        yield urls[0]


@pytest.fixture(params=["memory", "redis", "cluster"])
async def make_store(request: pytest.FixtureRequest) -> AsyncIterator[MakeStore]:
    """make_store(**limits): a new, empty store, whose leases last unless the test says how long."""

    def limits_of(changes: dict[str, float]) -> JournalLimits:
        return JournalLimits(**{"lease_s": NEVER_S, **changes})

    if request.param == "memory":

        def make_in_memory(**changes: float) -> JournalStore:
            store = MemoryJournalStore(limits_of(changes))
            store.journals = MemoryJournals(limits_of(changes), loop_time)
            return store

        with simulated_time():
            yield make_in_memory
        return
    url = request.getfixturevalue(f"{request.param}_url")
    async with AsyncExitStack() as opened:

        def make(**changes: float) -> JournalStore:
            store = RedisJournalStore(url, limits_of(changes))
            opened.push_async_callback(store.aclose)
            return store

        await flush(make())
        yield make


async def flush(store: JournalStore) -> RedisClient:
    """Its client, when all is gone from all nodes."""
    assert isinstance(store, RedisJournalStore)
    client = await store._scripts.client()
    await client.flushall()  # of a cluster that is all primaries
    return client


def add(
    owner: str, position: int, *records: bytes, action: LeaseAction = LeaseAction.HOLD, stream: str = "s"
) -> list[Append]:
    return [Append(stream, owner, position, records, action)]


async def hold(store: JournalStore, *args: object, **named: object) -> LeaseStatus:
    (result,) = await store.append(add(*args, **named))  # type: ignore[arg-type]
    return result.lease


async def lapse(store: JournalStore, stream: str = "s") -> None:
    while (view := await store.read(stream, 0)) is not None and view.leased:  # noqa: ASYNC110 - no event for it
        await asyncio.sleep(0.01)


async def test_what_was_written_is_read_in_order(make_store: MakeStore) -> None:
    store = make_store()
    before = loop_time()
    assert await store.create("s", "a", b"doc\x00\xff") is LeaseStatus.HELD
    assert await hold(store, "a", 0, b"one", b"two\n\x00") is LeaseStatus.HELD
    assert await hold(store, "a", 2, b"three") is LeaseStatus.HELD
    view = await store.read("s", 0)
    assert view is not None
    assert (view.document, view.records) == (b"doc\x00\xff", (b"one", b"two\n\x00", b"three"))
    assert (view.finished, view.leased) == (False, True)
    assert 0 <= view.age_s < loop_time() - before + 0.005  # Redis counts whole milliseconds
    later = await store.read("s", 2)
    assert later is not None
    assert (later.document, later.records) == (b"", (b"three",))
    past = await store.read("s", 9)
    assert past is not None
    assert past.records == ()


async def test_a_repeated_append_adds_nothing_twice(make_store: MakeStore) -> None:
    store = make_store()
    await store.create("s", "a", b"")
    await hold(store, "a", 0, b"one")
    assert await hold(store, "a", 0, b"one") is LeaseStatus.HELD
    assert await hold(store, "a", 0, b"one", b"two") is LeaseStatus.HELD
    assert await hold(store, "a", 1, b"two", action=LeaseAction.FINISH) is LeaseStatus.HELD
    assert await hold(store, "a", 1, b"two", action=LeaseAction.FINISH) is LeaseStatus.HELD
    view = await store.read("s", 0)
    assert view is not None
    assert (view.records, view.finished) == ((b"one", b"two"), True)


async def test_only_the_owner_writes(make_store: MakeStore) -> None:
    store = make_store()
    await store.create("s", "a", b"doc")
    assert await hold(store, "b", 0, b"forged") is LeaseStatus.LOST
    assert await hold(store, "b", 7, b"forged") is LeaseStatus.LOST
    assert await store.create("s", "b", b"forged") is LeaseStatus.LOST
    assert not await store.acquire("s", "b")
    view = await store.read("s", 0)
    assert view is not None
    assert (view.document, view.records) == (b"doc", ())


async def test_a_lapsed_lease_goes_to_one_of_many(make_store: MakeStore) -> None:
    store = make_store(lease_s=LEASE_S)
    await store.create("s", "a", b"")
    await hold(store, "a", 0, b"one")
    await lapse(store)
    won = await asyncio.gather(*(store.acquire("s", f"owner {n}") for n in range(10)))
    assert won.count(True) == 1
    assert await hold(store, "a", 1, b"two") is LeaseStatus.LOST
    assert await hold(store, f"owner {won.index(True)}", 1, b"two") is LeaseStatus.HELD


async def test_an_owner_that_was_only_slow_goes_on(make_store: MakeStore) -> None:
    store = make_store(lease_s=LEASE_S)
    await store.create("s", "a", b"")
    await lapse(store)
    assert await hold(store, "a", 0, b"one") is LeaseStatus.HELD
    assert not await store.acquire("s", "b")


async def test_renewing_keeps_the_lease(make_store: MakeStore) -> None:
    store = make_store(lease_s=LEASE_S)
    await store.create("s", "a", b"")
    for _ in range(6):
        await asyncio.sleep(LEASE_S / 4)
        assert await hold(store, "a", 0) is LeaseStatus.HELD
        assert not await store.acquire("s", "b")


async def test_a_released_journal_is_taken_at_once_and_a_finished_one_never(make_store: MakeStore) -> None:
    store = make_store()
    await store.create("s", "a", b"")
    await hold(store, "a", 0, b"one", action=LeaseAction.RELEASE)
    assert await store.acquire("s", "b")
    await hold(store, "b", 1, action=LeaseAction.FINISH)
    view = await store.read("s", 0)
    assert view is not None
    assert (view.finished, view.leased) == (True, False)
    assert not await store.acquire("s", "c")


async def test_a_dropped_journal_is_gone(make_store: MakeStore) -> None:
    store = make_store()
    await store.create("s", "a", b"")
    assert await hold(store, "a", 0, action=LeaseAction.DROP) is LeaseStatus.HELD
    assert await store.read("s", 0) is None
    assert not await store.acquire("s", "b")


async def test_what_a_store_lost_its_owner_is_told(make_store: MakeStore) -> None:
    store = make_store()
    assert await hold(store, "a", 0, b"one") is LeaseStatus.GONE
    await store.create("s", "a", b"")
    assert await hold(store, "a", 3, b"four") is LeaseStatus.GONE  # another store that knows only the beginning
    assert await store.read("s", 0) is None
    assert await store.create("s", "a", b"") is LeaseStatus.HELD


async def test_a_journal_that_nobody_touches_expires(make_store: MakeStore) -> None:
    store = make_store(expiry_s=1.0)
    await store.create("s", "a", b"doc")
    await hold(store, "a", 0, b"one", action=LeaseAction.FINISH)
    lived_s = 0.0
    while lived_s < 1.2:
        before = loop_time()
        await asyncio.sleep(0.4)
        there = await store.read("s", 0) is not None  # reading touches it
        if (gap_s := loop_time() - before) < 0.95:
            assert there
            lived_s += gap_s
        else:  # the machine stood still, and Redis's clock went on
            lived_s = 0.0
            await store.create("s", "a", b"doc")
            await hold(store, "a", 0, b"one", action=LeaseAction.FINISH)
    await asyncio.sleep(1.05)
    assert await store.read("s", 0) is None
    assert await hold(store, "a", 1, b"two") is LeaseStatus.GONE


@pytest.mark.parametrize("limits", [{"max_journals": 4}, {"max_bytes": 40}])
async def test_the_tenant_that_holds_most_makes_room(make_store: MakeStore, limits: dict[str, int]) -> None:
    store = make_store(**limits)

    async def create(name: str, tenant: str) -> LeaseStatus:
        lease = await store.create(name, "a", b"0123456789", tenant)
        await hold(store, "a", 0, action=LeaseAction.FINISH, stream=name)
        return lease

    async def kept(*names: str) -> list[str]:
        return [name for name in names if await store.read(name, 1) is not None]

    for name, tenant in (("small 1", "small"), ("big 1", "big"), ("big 2", "big"), ("big 3", "big")):
        assert await create(name, tenant) is LeaseStatus.HELD
    assert await create("big 4", "big") is LeaseStatus.HELD
    assert await create("small 2", "small") is LeaseStatus.HELD
    everything = [f"{tenant} {n}" for tenant in ("small", "big") for n in (1, 2, 3, 4)]
    assert await kept(*everything) == ["small 1", "small 2", "big 3", "big 4"]
    assert await create("other 1", "other") is LeaseStatus.HELD
    assert "other 1" in await kept("other 1")
    assert len(await kept(*everything)) == 3
    assert await store.size() == (4, 40)


async def test_the_oldest_unowned_journal_makes_room(make_store: MakeStore) -> None:
    store = make_store(max_journals=3)
    for name in ("one", "two", "three"):
        await store.create(name, "a", b"")
        await asyncio.sleep(0.002)
    assert await store.create("four", "a", b"") is LeaseStatus.FULL
    assert await store.read("four", 0) is None
    await hold(store, "a", 0, action=LeaseAction.FINISH, stream="three")
    await asyncio.sleep(0.002)
    await hold(store, "a", 0, action=LeaseAction.RELEASE, stream="two")
    assert await store.create("four", "a", b"") is LeaseStatus.HELD
    assert await store.read("three", 0) is None
    assert await store.read("two", 0) is not None
    assert await store.read("one", 0) is not None


async def test_bytes_are_bounded(make_store: MakeStore) -> None:
    store = make_store(max_bytes=100)
    assert await store.create("big", "a", b"d" * 101) is LeaseStatus.FULL
    await store.create("old", "a", b"d" * 40)
    await hold(store, "a", 0, action=LeaseAction.FINISH, stream="old")
    await store.create("s", "a", b"d" * 40)
    assert await hold(store, "a", 0, b"r" * 20) is LeaseStatus.HELD
    assert await hold(store, "a", 1, b"r" * 20) is LeaseStatus.HELD
    assert await store.read("old", 0) is None
    assert await hold(store, "a", 2, b"r" * 21) is LeaseStatus.FULL
    assert await store.read("s", 0) is None
    assert await store.create("next", "a", b"d" * 100) is LeaseStatus.HELD


async def test_many_journals_in_one_call(make_store: MakeStore) -> None:
    store = make_store()
    await store.create("s", "a", b"")
    await store.create("t", "b", b"")
    appends = (
        add("a", 0, b"1") + add("a", 0, b"x", stream="t") + add("b", 0, b"2", stream="t") + add("c", 0, stream="u")
    )
    assert [result.lease for result in await store.append(appends)] == [
        LeaseStatus.HELD,
        LeaseStatus.LOST,
        LeaseStatus.HELD,
        LeaseStatus.GONE,
    ]
    assert await store.append([]) == []


async def test_whoever_owns_a_journal_is_told_to_stop(make_store: MakeStore) -> None:
    store = make_store(lease_s=LEASE_S)
    assert await store.ask_to_stop("s1") is False
    await store.create("s1", "one", b"document")
    (before,) = await store.append([Append("s1", "one", 0, (b"a",))])
    assert await store.ask_to_stop("s1") is True
    (after,) = await store.append([Append("s1", "one", 1, action=LeaseAction.RELEASE)])
    assert (before.stop, after.stop) == (False, True)
    assert await store.acquire("s1", "two")
    (next_owners,) = await store.append([Append("s1", "two", 1)])
    assert (next_owners.lease, next_owners.stop) == (LeaseStatus.HELD, True)


async def test_an_erased_journal_is_empty_and_its_owner_lost_it(make_store: MakeStore) -> None:
    store = make_store()
    assert await store.erase("s1") is False
    await store.create("s1", "one", b"document")
    await store.append([Append("s1", "one", 0, (b"a", b"b"))])
    await store.create("s2", "other", b"1234")
    assert await store.erase("s1") is True
    view = await store.read("s1", 0)
    assert view is not None
    assert (view.document, view.records, view.finished, view.leased) == (b"", (), True, False)
    assert await store.size() == (2, 4)
    (answer,) = await store.append([Append("s1", "one", 2, (b"c",))])
    assert answer.lease is LeaseStatus.LOST
    assert await store.create("s1", "one", b"document") is LeaseStatus.LOST, "it is not written again"
    assert await store.acquire("s1", "two") is False
    assert await store.size() == (2, 4)


async def test_stores_of_different_kinds_share_nothing(redis_url: str) -> None:
    limits = JournalLimits()
    async with AsyncExitStack() as opened:
        stores = [RedisJournalStore(redis_url, limits, kind) for kind in ("", "responses")]
        for store in stores:
            opened.push_async_callback(store.aclose)
        await flush(stores[0])
        await stores[0].create("s1", "one", b"document")
        assert await stores[1].read("s1", 0) is None
        assert [await store.size() for store in stores] == [(1, 8), (0, 0)]


async def test_an_owner_hears_when_somebody_reads(make_store: MakeStore) -> None:
    store = make_store()
    await store.create("s", "a", b"")
    (result,) = await store.append(add("a", 0))
    assert result.unread_s is None
    before = loop_time()
    await store.read("s", 0)
    await asyncio.sleep(0.02)
    (result,) = await store.append(add("a", 0))
    assert result.unread_s is not None
    assert 0.015 < result.unread_s < loop_time() - before + 0.005  # Redis counts whole milliseconds


@pytest.mark.parametrize("news", ["record", "finish", "release", "lapse"])
async def test_a_reader_waits_for_news(make_store: MakeStore, news: str) -> None:
    store = make_store(lease_s=NEVER_S if news != "lapse" else LEASE_S)
    await store.create("s", "a", b"")
    reading = asyncio.create_task(store.read("s", 0, wait_s=600))
    await asyncio.sleep(0.03)
    assert not reading.done()
    match news:
        case "record":
            await hold(store, "a", 0, b"one")
        case "finish" | "release":
            await hold(store, "a", 0, action=LeaseAction(news))
    async with asyncio.timeout(60):
        view = await reading
    assert view is not None
    assert view.records == ((b"one",) if news == "record" else ())
    assert view.finished is (news == "finish")
    assert view.leased is (news == "record")


async def test_a_reader_does_not_wait_longer_than_it_wants(make_store: MakeStore) -> None:
    store = make_store()
    await store.create("s", "a", b"")
    async with asyncio.timeout(60):
        assert await store.read("s", 0, wait_s=0.1) is not None
        assert await store.read("nothing", 0, wait_s=600) is None


def test_idle_counts_return_to_nothing() -> None:
    now = [0.0]
    journals = MemoryJournals(JournalLimits(expiry_s=10, lease_s=1), lambda: now[0])
    for n in range(5):
        journals.create(str(n), "a", b"document")
        journals.append(Append(str(n), "a", 0, (b"record",), LeaseAction.FINISH if n % 2 else LeaseAction.HOLD))
    assert (len(journals), journals.size_bytes) == (5, 70)
    now[0] = 10.1
    journals.expire()
    assert (len(journals), journals.size_bytes) == (0, 0)


async def test_what_is_kept_is_counted_and_what_has_expired_is_not(make_store: MakeStore) -> None:
    store = make_store(expiry_s=3.0)
    assert await store.size() == (0, 0)
    for n in range(5):
        await store.create(str(n), "a", b"document")
        await store.append(add("a", 0, b"record", stream=str(n)))
    assert await store.size() == (5, 70)
    await hold(store, "a", 1, action=LeaseAction.DROP, stream="0")
    assert await store.size() == (4, 56)
    async with asyncio.timeout(60):
        while await store.size() != (0, 0):  # noqa: ASYNC110 - counting must be enough to forget them
            await asyncio.sleep(0.05)


async def test_redis_counts_return_to_nothing(redis_url: str) -> None:
    store = RedisJournalStore(redis_url, JournalLimits(expiry_s=3.0))
    client = await flush(store)
    for n in range(5):
        await store.create(str(n), "a", b"document")
        await store.append(add("a", 0, b"record", stream=str(n)))
    assert int(await client.get("{serve_app}:bytes")) == 70
    await asyncio.sleep(3.05)
    await store.create("last", "a", b"")
    assert int(await client.get("{serve_app}:bytes")) == 0
    assert await client.hgetall("{serve_app}:held") == {b"": b"0"}
    assert await client.zcard("{serve_app}:journals") == await client.zcard("{serve_app}:tenant:") == 1
    async with asyncio.timeout(60):
        while await client.keys("*"):  # noqa: ASYNC110 - also when nobody calls the store any more
            await asyncio.sleep(0.05)
    await store.aclose()


async def test_a_redis_that_is_not_there(unused_tcp_port: int) -> None:
    store = RedisJournalStore(f"redis://127.0.0.1:{unused_tcp_port}/0", JournalLimits())
    for call in (
        store.create("s", "a", b""),
        store.append(add("a", 0)),
        store.read("s", 0),
        store.acquire("s", "a"),
        store.size(),
    ):
        with pytest.raises(StoreUnavailable, match="Redis"):
            await call
    await store.aclose()


async def test_a_redis_that_was_restarted_is_found_again() -> None:
    with redis_server() as url:
        store = RedisJournalStore(url, JournalLimits())
        await store.create("s", "a", b"")
        async with Redis.from_url(url) as other:
            await other.client_kill_filter(_type="normal", skipme=True)
            assert await store.read("s", 0) is not None
            await other.script_flush()
            assert await hold(store, "a", 0, b"one") is LeaseStatus.HELD
    with pytest.raises(StoreUnavailable):
        await store.read("s", 0)
    await store.aclose()


async def test_all_keys_of_a_cluster_are_in_one_slot_and_are_found_when_it_moves() -> None:
    """To another node, as when a cluster is given more nodes; and the URL may name any of them."""
    with redis_cluster() as urls:
        stores = [RedisJournalStore(url, JournalLimits(lease_s=NEVER_S)) for url in urls]
        await stores[0].create("s", "a", b"doc")
        assert await hold(stores[1], "a", 0, b"one") is LeaseStatus.HELD
        clients = [Redis.from_url(url, decode_responses=True) for url in urls]
        found = [await client.keys("*") for client in clients]
        assert sorted(map(len, found)) == [0, 0, 8]
        keys = max(found, key=len)
        (slot,) = {await clients[0].execute_command("CLUSTER KEYSLOT", key) for key in keys}
        source = clients[found.index(keys)]
        target = clients[found.index([])]
        ids = {client: await client.execute_command("CLUSTER MYID") for client in clients}
        port = target.connection_pool.connection_kwargs["port"]
        await target.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", ids[source])
        await source.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", ids[target])
        await source.execute_command("MIGRATE", "127.0.0.1", port, "", 0, 5000, "KEYS", *keys)
        for client in (target, source, *clients):
            await client.execute_command("CLUSTER SETSLOT", slot, "NODE", ids[target])
        for position, store in enumerate(stores, 1):
            assert await hold(store, "a", position, b"more") is LeaseStatus.HELD
            view = await store.read("s", 0)
            assert view is not None
            assert view.records == (b"one", *[b"more"] * position)
        for closing in (*stores, *clients):
            await closing.aclose()


async def test_a_cluster_has_one_database(cluster_url: str) -> None:
    store = RedisJournalStore(cluster_url.removesuffix("/0") + "/1", JournalLimits())
    with pytest.raises(StoreUnavailable, match="SELECT is not allowed in cluster mode"):
        await store.read(new_stream_id(), 0)
    await store.aclose()


async def test_a_user_that_may_not_ask_what_redis_is_uses_one_server(redis_url: str) -> None:
    async with Redis.from_url(redis_url) as client:
        await client.execute_command("ACL SETUSER journals on >secret ~{serve_app}:* +@all -info")
    store = RedisJournalStore(redis_url.replace("//", "//journals:secret@"), JournalLimits(lease_s=NEVER_S))
    assert await store.create(new_stream_id(), "a", b"doc") is LeaseStatus.HELD
    await store.aclose()


async def test_a_server_that_says_nothing_of_clusters_is_one_server(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Redis, "info", AsyncMock(return_value={}))
    store = RedisJournalStore(redis_url, JournalLimits(lease_s=NEVER_S))
    assert await store.create(new_stream_id(), "a", b"doc") is LeaseStatus.HELD
    await store.aclose()


async def test_an_error_of_redis_names_no_stream(redis_url: str) -> None:
    """Some quote what failed."""
    store = RedisJournalStore(redis_url, JournalLimits())
    client = await flush(store)
    stream_id = new_stream_id()
    await client.hset("{serve_app}:records:" + stream_id, "not", "a list")
    await store.create(stream_id, "a", b"doc")
    quoting = ResponseError(f"Command # 1 (EVALSHA 5ba 5 {{serve_app}}:journal:{stream_id}) of pipeline caused error")
    for attempt, error in ((store.append(add("a", 0, b"one", stream=stream_id)), "WRONGTYPE"), (None, stream_id[:8])):
        if attempt is None:
            client.evalsha = AsyncMock(side_effect=quoting)  # type: ignore[method-assign]
            attempt = store.append(add("a", 0, b"one", stream=stream_id))
        with pytest.raises(StoreUnavailable, match=error) as told:
            await attempt
        assert stream_id not in "".join(traceback.format_exception(told.value))
    await store.aclose()
