"""The rules of counting, for each store that there is: in memory, through messages, and in a real Redis."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from math import floor

import pytest
from exploring import cases
from hypothesis import given, settings
from hypothesis import strategies as st
from limited_callers import NOON_S, Clock
from redis.asyncio import Redis
from redis_server import redis_server
from simulated_time import simulated_time

from serve_app.access.memory_quotas import MemoryQuotas, MemoryQuotaStore
from serve_app.access.quotas import (
    LEASE_S,
    Answer,
    Ask,
    Demand,
    Message,
    QuotaStore,
    QuotaUnavailable,
    Renew,
    Settle,
    decode,
    encode_answers,
)
from serve_app.access.redis_quotas import redis_quotas
from serve_app.access.shared_quotas import RETRY_S, SharedQuotas

KEY, TENANT = Demand("key laptop", 3, 100, 150, 2), Demand("tenant office", 5, 120, None, None)
BOTH = (KEY, TENANT)
NEVER_S = 1e6
"""A lease that no test outlasts."""


def through_messages(quotas: MemoryQuotas) -> SharedQuotas:
    """A store that the actor could be."""

    async def carry(package: bytes, messages: list[Message]) -> bytes:
        return encode_answers([quotas.perform(message) for message in decode(package)])

    async def aclose() -> None:
        pass

    return SharedQuotas(carry, aclose)


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    with redis_server() as url:
        yield url


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["memory", "messages", "redis"])
async def store(request: pytest.FixtureRequest, clock: Clock) -> AsyncIterator[QuotaStore]:
    if request.param == "memory":
        yield MemoryQuotaStore(MemoryQuotas(NEVER_S, clock))
        return
    if request.param == "messages":
        yield through_messages(MemoryQuotas(NEVER_S, clock))
        return
    url = request.getfixturevalue("redis_url")
    made = redis_quotas(url, clock=clock, lease_s=NEVER_S, timeout_s=30)
    async with Redis.from_url(url) as client:
        await client.flushall()
    yield made
    await made.aclose()


def refusals(answer: Answer) -> list[tuple[int, int]]:
    """(number of the demand, what it counts) of the limits that refuse."""
    return [(use.subject, use.measure) for use in answer if use.wait_s]


def used(answer: Answer) -> list[int]:
    return [use.used for use in answer]


async def test_a_request_counts_for_its_key_and_its_tenant_or_for_neither(store: QuotaStore) -> None:
    first = await store.ask(Ask("a", BOTH, 60, stream=True))
    assert used(first) == [0, 0, 0, 0, 0, 0]
    assert [(use.subject, use.measure, use.most) for use in first] == [
        (0, 0, 3), (0, 1, 100), (0, 2, 150), (0, 3, 2), (1, 0, 5), (1, 1, 120)
    ]  # fmt: skip
    refused = await store.ask(Ask("b", BOTH, 70, stream=True))
    assert refusals(refused) == [(0, 1), (1, 1)]
    assert used(refused) == [1, 60, 60, 1, 1, 60]
    assert used(await store.ask(Ask("c", BOTH, 40, stream=True))) == [1, 60, 60, 1, 1, 60]
    full = await store.ask(Ask("d", BOTH, 0, stream=True))
    assert refusals(full) == [(0, 3)]
    assert not refusals(await store.ask(Ask("e", BOTH)))  # no stream, no tokens: such as a list of models
    assert refusals(await store.ask(Ask("f", BOTH))) == [(0, 0)]


async def test_what_was_not_used_is_given_back_once_to_the_window_it_came_from(store: QuotaStore, clock: Clock) -> None:
    clock.now_s = NOON_S + 30
    await store.ask(Ask("a", BOTH, 100, stream=True))
    clock.now_s = NOON_S + 60 + 15
    assert used(await store.ask(Ask("b", (KEY,), 0, stream=True))) == [0, 75, 100, 1]
    for _ in range(2):
        store.tell(Settle("a", ("key laptop", "tenant office"), 20))
    assert used(await store.ask(Ask("c", (KEY,), 10, stream=True))) == [1, 15, 20, 1]
    assert used(await store.ask(Ask("probe", (TENANT,)))) == [0, 15]
    clock.now_s += 3600
    store.tell(Settle("c", ("key laptop",), 0))
    assert used(await store.ask(Ask("d", (KEY,), 0))) == [0, 0, 20, 1]


async def test_a_message_may_be_repeated(store: QuotaStore) -> None:
    for _ in range(3):
        assert not refusals(await store.ask(Ask("a", BOTH, 60, stream=True)))
    assert used(await store.ask(Ask("b", (KEY,), 1, stream=True))) == [1, 60, 60, 1]


async def test_a_limit_that_was_lowered_keeps_what_was_used(store: QuotaStore) -> None:
    await store.ask(Ask("a", (KEY,), 90, stream=True))
    refused = await store.ask(Ask("b", (Demand("key laptop", 3, 50, None, None),), 1, stream=True))
    assert refusals(refused) == [(0, 1)]
    assert used(refused) == [1, 90]


@pytest.mark.parametrize("renewed", [True, False])
async def test_a_lease_that_nobody_renews_frees_its_place_and_keeps_its_tokens(renewed: bool) -> None:
    clock = Clock()
    quotas = MemoryQuotas(LEASE_S, clock)
    for lease in "ab":
        quotas.perform(Ask(lease, (KEY,), 10, stream=True))
    for _ in range(4):
        clock.now_s += LEASE_S / 3
        quotas.perform(Renew(("a",) if renewed else (), ("key laptop",)))
    assert used(quotas.perform(Ask("c", (KEY,), 0, stream=True)))[2:] == [20, 1 if renewed else 0]
    quotas.perform(Settle("b", ("key laptop",), 0))
    assert used(quotas.perform(Ask("d", (KEY,), 0)))[2] == 20


async def test_in_redis_too(redis_url: str) -> None:
    clock = Clock()
    store = redis_quotas(redis_url, clock=clock, timeout_s=30)
    client = Redis.from_url(redis_url)
    await client.flushall()
    for lease in "ab":
        await store.ask(Ask(lease, (KEY,), 10, stream=True))
    clock.now_s += LEASE_S - 1
    store.tell(Renew(("a", "gone"), ("key laptop",)))
    assert await client.pttl("{serve_app}:quotas:lease:a") > (LEASE_S - 1) * 1000 - 500
    clock.now_s += 2
    assert used(await store.ask(Ask("c", (KEY,), 0, stream=True)))[2:] == [20, 1]
    await client.delete("{serve_app}:quotas:lease:b")  # what Redis does by its own clock
    store.tell(Settle("b", ("key laptop",), 0))
    assert used(await store.ask(Ask("d", (KEY,), 0)))[2] == 20
    await client.aclose()
    await store.aclose()


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.integers(0, 60), st.integers(0, 3)),
        st.tuples(st.just("settle"), st.integers(0, 9), st.integers(0, 60)),
        st.tuples(st.just("wait"), st.integers(1, 300), st.just(0)),
    ),
    max_size=30,
)
CALLERS = (BOTH, (KEY,), (TENANT,), (Demand("key phone", None, 80, None, 1), TENANT))


def played(
    operations: list[tuple[str, int, int]], ask: Callable[[Ask], Answer], tell: Callable[[Settle], object], clock: Clock
) -> list[Answer]:
    """The answers to the operations, each for the same leases in the same order."""
    answers: list[Answer] = []
    held: list[Ask] = []
    for number, (kind, first, second) in enumerate(operations):
        if kind == "wait":
            clock.now_s += first / 3
        elif kind == "ask":
            asked = Ask(f"lease {number}", CALLERS[second], first, stream=True)
            answers.append(ask(asked))
            if not refusals(answers[-1]):
                held.append(asked)
        elif held:
            ended = held.pop(first % len(held))
            tell(Settle(ended.lease, tuple(each.subject for each in ended.demands), min(second, ended.tokens)))
    return answers


@settings(max_examples=cases(60, exploring=1000), deadline=None)
@given(OPERATIONS)
def test_no_window_ever_holds_more_than_its_limit(operations: list[tuple[str, int, int]]) -> None:
    """A model that keeps every use: [(moment, tokens)] of each subject, changed when a request gives back."""
    clock = Clock()
    quotas = MemoryQuotas(NEVER_S, clock)
    uses: defaultdict[str, dict[str, tuple[float, int]]] = defaultdict(dict)

    def counted(subject: str, period_s: int) -> int:
        index = floor(clock.now_s / period_s)
        sums = [
            sum(tokens for then, tokens in uses[subject].values() if floor(then / period_s) == at)
            for at in (index - 1, index)
        ]
        return floor(sums[0] * ((index + 1) * period_s - clock.now_s) / period_s) + sums[1]

    def ask(asked: Ask) -> Answer:
        answer = quotas.perform(asked)
        for use in answer:
            demand = asked.demands[use.subject]
            if use.measure in (1, 2):
                assert use.used == counted(demand.subject, (60, 86_400)[use.measure - 1])
                assert bool(use.wait_s) == (use.used + asked.tokens > use.most and asked.tokens > 0)
        if not refusals(answer):
            for demand in asked.demands:
                uses[demand.subject][asked.lease] = (clock.now_s, asked.tokens)
                for most, period_s in ((demand.tokens, 60), (demand.tokens_day, 86_400)):
                    assert most is None or not asked.tokens or counted(demand.subject, period_s) <= most
        return answer

    def tell(settle: Settle) -> None:
        quotas.perform(settle)
        for subject in settle.subjects:
            uses[subject][settle.lease] = (uses[subject][settle.lease][0], settle.used_tokens)

    played(operations, ask, tell, clock)


@settings(max_examples=cases(15, exploring=1000), deadline=None)
@given(OPERATIONS)
def test_redis_and_memory_answer_alike(redis_url: str, operations: list[tuple[str, int, int]]) -> None:
    clock = Clock()
    quotas = MemoryQuotas(NEVER_S, clock)
    told: list[tuple[Message, Answer, float]] = []

    def perform(message: Message) -> Answer:
        told.append((message, quotas.perform(message), clock.now_s))
        return told[-1][1]

    played(operations, perform, perform, clock)

    async def again() -> None:
        store = redis_quotas(redis_url, clock=clock, lease_s=NEVER_S, timeout_s=30)
        async with Redis.from_url(redis_url) as client:
            await client.flushall()
        for message, answer, now_s in told:
            clock.now_s = now_s
            if isinstance(message, Ask):
                there = await store.ask(message)
                assert [tuple(use) for use in map(_fields, there)] == [tuple(use) for use in map(_fields, answer)]
            else:
                store.tell(message)  # type: ignore[arg-type]
        await store.aclose()

    asyncio.run(again())


def _fields(use: object) -> tuple[float, ...]:
    values = tuple(getattr(use, name) for name in ("subject", "measure", "most", "used", "reset_s", "wait_s"))
    return tuple(round(value, 5) for value in values)


async def test_two_ingresses_never_exceed_together(clock: Clock) -> None:
    quotas = MemoryQuotas(LEASE_S, clock)
    ingresses = [through_messages(quotas) for _ in range(2)]
    demand = Demand("key laptop", 50, 1000, None, 20)
    asked = [ingresses[n % 2].ask(Ask(f"{n}", (demand,), 7, stream=True)) for n in range(100)]
    answers = await asyncio.gather(*asked)
    assert sum(not refusals(answer) for answer in answers) == 20
    for n in range(100):
        ingresses[(n + 1) % 2].tell(Settle(f"{n}", ("key laptop",), 7))
    more = [ingresses[n % 2].ask(Ask(f"more {n}", (demand,), 100, stream=True)) for n in range(20)]
    assert sum(not refusals(answer) for answer in await asyncio.gather(*more)) == 8  # 20 * 7 + 8 * 100


async def test_messages_of_one_tick_go_together_and_in_order() -> None:
    packages: list[list[Message]] = []

    async def carry(package: bytes, messages: list[Message]) -> bytes:
        packages.append(messages)
        await asyncio.sleep(0)
        return encode_answers([[] for _ in messages])

    async def aclose() -> None:
        pass

    store = SharedQuotas(carry, aclose)
    asks = [asyncio.create_task(store.ask(Ask(f"{n}", BOTH))) for n in range(3)]
    await asks[0]
    store.tell(Settle("0", (), 0))
    store.tell(Renew(("1",), ()))
    await store.aclose()
    assert [[type(message).__name__ for message in package] for package in packages] == [
        ["Ask", "Ask", "Ask"],
        ["Settle", "Renew"],
    ]


async def test_a_store_that_fails_is_not_asked_at_once_again_and_hears_of_what_ended() -> None:
    fails, heard = True, list[Message]()

    async def carry(package: bytes, messages: list[Message]) -> bytes:
        if fails:
            raise QuotaUnavailable("gone")
        heard.extend(messages)
        return encode_answers([[] for _ in messages])

    async def aclose() -> None:
        pass

    store = SharedQuotas(carry, aclose)
    with simulated_time():
        with pytest.raises(QuotaUnavailable, match="gone"):
            await store.ask(Ask("a", BOTH, 1, stream=True))
        store.tell(Settle("a", (), 0))
        with pytest.raises(QuotaUnavailable, match="a moment ago"):
            await store.ask(Ask("b", BOTH))
        await asyncio.sleep(RETRY_S)
        fails = False
        assert await store.ask(Ask("c", BOTH)) == []
    assert [message.lease for message in heard if not isinstance(message, Renew)] == ["a", "c"]
