"""Clients that open requests and send no body try to keep others out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from asgi_driver import Exchange
from fake_replica import FakeReplica, says, tokens
from memory_metrics import MemoryMetrics
from starlette.applications import Starlette

from serve_app.api.http import body as body_module
from serve_app.api.http.slow_bodies import MAX_SLOW, MAX_SLOW_PER_CLIENT, SlowBodies, TooManySlowBodies

HI = {"messages": [{"role": "user", "content": "Hi"}]}
MakeApp = Callable[..., Starlette]


def silent(app: Starlette, address: str | None = "192.0.2.1") -> Exchange:
    """A request whose headers are there and whose body is not."""
    exchange = Exchange(app, "POST", "/stream", headers={"content-length": "100"})
    exchange._incoming.get_nowait()
    exchange._scope["client"] = (address, 1) if address else None
    return exchange


async def ended(exchanges: list[Exchange], count: int) -> list[Exchange]:
    """Wait until so many have ended, and give those."""
    async with asyncio.timeout(60):
        while sum(exchange.task.done() for exchange in exchanges) < count:  # noqa: ASYNC110 - tasks have no count
            await asyncio.sleep(0.001)
    return [exchange for exchange in exchanges if exchange.task.done()]


async def leave(exchanges: list[Exchange]) -> None:
    for exchange in exchanges:
        exchange.disconnect()
        await exchange.end()


async def test_hundreds_that_send_nothing_refuse_nobody(
    replica: FakeReplica, make_app: MakeApp, http: Any, metrics: MemoryMetrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body_module, "PROMPTLY_S", 600)  # on a machine that stalls they are not slow meanwhile
    app = make_app(replica, max_streams=2)
    silents = [silent(app) for _ in range(300)]
    await asyncio.sleep(0)
    client: httpx.AsyncClient = http(app)
    assert (await client.post("/stream", json=HI)).status_code == 200
    assert metrics.gauges["serve_app_requests_in_progress", ()] == 0
    await leave(silents)
    assert [exchange.sent for exchange in silents] == [[]] * 300


async def test_one_address_is_waited_for_a_few_times(
    replica: FakeReplica, make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body_module, "PROMPTLY_S", 0.05)
    app = make_app(replica)
    mine = [silent(app) for _ in range(MAX_SLOW_PER_CLIENT + 20)]
    refused = await ended(mine, 20)
    assert len(refused) == 20
    for exchange in refused:
        assert exchange.status == 408
        assert b'"body_timeout"' in exchange.body
    other = silent(app, "192.0.2.2")
    other._incoming.put_nowait({"type": "http.request", "body": b'{"prompt": ', "more_body": True})
    await asyncio.sleep(0.1)
    other._incoming.put_nowait({"type": "http.request", "body": b'"Hi"}', "more_body": False})
    await other.end()
    assert other.status == 200  # what came before the wait was kept
    await leave([exchange for exchange in mine if exchange not in refused])
    again = silent(app)
    await asyncio.sleep(0.1)
    assert not again.task.done()  # places come back
    await leave([again])


async def test_a_body_that_is_there_needs_no_place(replica: FakeReplica, make_app: MakeApp, http: Any) -> None:
    app = make_app(replica)
    replica.scripts = [says(tokens(0, 84), None)]
    held = [Exchange(app, "POST", "/stream", HI) for _ in range(MAX_SLOW_PER_CLIENT * 3)]
    for exchange in held:
        await exchange.until(b"data: ")
    await leave(held)


async def test_one_request_too_many_is_refused_before_its_body_is_read(replica: FakeReplica, make_app: MakeApp) -> None:
    replica.scripts = [says(tokens(0, 84), None)]
    app = make_app(replica, max_streams=1)
    held = Exchange(app, "POST", "/stream", HI)
    await held.until(b"data: ")
    late = silent(app)
    await late.end()
    assert late.status == 503
    await leave([held])


def test_places_in_all_and_for_each_address() -> None:
    bodies = SlowBodies(limit=4, per_client=2)
    with bodies.place("192.0.2.1"), bodies.place("192.0.2.1"):
        with pytest.raises(TooManySlowBodies), bodies.place("192.0.2.1"):
            pass
        with bodies.place("192.0.2.2"), bodies.place(None):
            for address in ("192.0.2.3", None):
                with pytest.raises(TooManySlowBodies), bodies.place(address):
                    pass
    with bodies.place("192.0.2.1"):
        pass


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("127.0.0.1", "127.0.0.1", False),  # a proxy of this machine: anybody
        ("::1", "::1", False),
        ("::ffff:127.0.0.1", "::ffff:127.0.0.1", False),
        ("a socket", "a socket", True),
    ],
)
def test_what_counts_as_one_client(one: str, other: str, same: bool) -> None:
    bodies = SlowBodies(limit=MAX_SLOW, per_client=1)
    with bodies.place(one):
        if same:
            with pytest.raises(TooManySlowBodies), bodies.place(other):
                pass
        else:
            with bodies.place(other):
                pass
