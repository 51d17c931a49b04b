"""What a request reserves over a shared store: leases that are renewed, and given back however the request ends."""

from __future__ import annotations

import asyncio

import pytest
from limited_callers import caller
from memory_metrics import MemoryMetrics
from simulated_time import simulated_time

from serve_app.access.quotas import Answer, Ask, Measure, Renew, Settle, Use
from serve_app.access.reservations import LimitReached, Quotas, Reservation

WHO = caller(requests_per_minute=10, tokens_per_minute=1000, streams=2)


class SlowStore:
    """Answers after a moment, and tells what it heard."""

    lease_s: float | None = 30.0

    def __init__(self, *uses: Use) -> None:
        self.heard: list[tuple[float, str, object]] = []
        self._uses = list(uses)

    async def ask(self, ask: Ask) -> Answer:
        self._hear("ask", ask.tokens)
        await asyncio.sleep(0.5)
        return self._uses

    def tell(self, message: Settle | Renew) -> None:
        if isinstance(message, Settle):
            self._hear("settle", message.used_tokens)
        else:
            self._hear("renew", len(message.leases))

    async def aclose(self) -> None:
        pass

    def _hear(self, what: str, number: int) -> None:
        self.heard.append((round(asyncio.get_running_loop().time() - self.began, 1), what, number))

    began = 0.0


def begun(store: SlowStore) -> Reservation:
    store.began = asyncio.get_running_loop().time()
    reservation = Quotas(store, MemoryMetrics()).reservation(WHO)
    assert reservation is not None
    return reservation


async def test_a_running_request_renews_its_lease_until_it_ends() -> None:
    with simulated_time():
        store = SlowStore()
        reservation = begun(store)
        await reservation.take(100, stream=True)
        await asyncio.sleep(25)
        reservation.end(40)
        reservation.end(40)
        await asyncio.sleep(60)
    assert store.heard == [(0.0, "ask", 100), (10.0, "renew", 1), (20.0, "renew", 1), (25.5, "settle", 40)]


async def test_a_client_that_leaves_before_the_store_answers_gives_all_back() -> None:
    with simulated_time():
        store = SlowStore()
        reservation = begun(store)
        taking = asyncio.create_task(reservation.take(100, stream=True))
        await asyncio.sleep(0.1)
        taking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await taking
        reservation.end(0)
    assert store.heard == [(0.0, "ask", 100), (0.1, "settle", 0)]


async def test_what_outlives_its_request_settles_at_its_own_end() -> None:
    class Stream:
        async def closed(self) -> None:
            await asyncio.sleep(3)

    with simulated_time():
        store = SlowStore()
        reservation = begun(store)
        await reservation.take(100, stream=True)
        reservation.outlived_by(Stream(), lambda: 70)
        reservation.end(0)
        await asyncio.sleep(5)
    assert store.heard == [(0.0, "ask", 100), (3.5, "settle", 70)]


async def test_a_caller_without_requests_left_is_refused_without_asking_until_it_has_some() -> None:
    with simulated_time():
        store = SlowStore(Use(0, Measure.REQUESTS, 10, 10, 60.0, 20.0), Use(0, Measure.STREAMS, 2, 2, 0.0, 1.0))
        store.began = asyncio.get_running_loop().time()
        quotas = Quotas(store, MemoryMetrics())
        waits: list[float] = []
        for pause_s in (0, 15, 6):
            await asyncio.sleep(pause_s)
            reservation = quotas.reservation(WHO)
            assert reservation is not None
            with pytest.raises(LimitReached, match="requests per minute: limit 10, used 10") as refused:
                await reservation.take(100, stream=True)
            reservation.end(0)
            waits.append(round(refused.value.retry_after_s or 0, 1))
    assert waits == [20.0, 5.0, 20.0]
    assert store.heard == [(0.0, "ask", 100), (21.5, "ask", 100)]
