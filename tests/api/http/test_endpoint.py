from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from asgi_driver import Exchange
from fake_replica import ALIVE, FakeReplica, Script, says, tokens
from memory_metrics import MemoryMetrics
from simulated_time import simulated_time
from starlette.applications import Starlette

from serve_app.core import Failure, FailureCode, FinishReason

HI = {"messages": [{"role": "user", "content": "Hi"}]}
MakeApp = Callable[..., Starlette]
STREAMS = [
    ("/stream", HI),
    ("/v1/chat/completions", {**HI, "stream": True}),
    ("/v1/completions", {"prompt": "Hi", "stream": True}),
    ("/v1/messages", {**HI, "stream": True, "max_tokens": 100}),
]


@pytest.mark.parametrize(("path", "body"), STREAMS)
async def test_a_client_that_goes_after_a_token_stops_the_work(
    replica: FakeReplica, make_app: MakeApp, path: str, body: dict[str, Any]
) -> None:
    replica.scripts = [says(tokens(0, 84), None)]
    exchange = Exchange(make_app(replica), "POST", path, body)
    await exchange.until(b"data: ")
    assert replica.closed == 0
    exchange.disconnect()
    await exchange.end()
    assert (replica.cancelled, replica.closed) == (1, 1)
    assert not exchange.complete


@pytest.mark.parametrize("body", [HI, {**HI, "n": 4}])
@pytest.mark.parametrize("script", [says(None), says(ALIVE, None), says(tokens(0, 84), None)])
async def test_a_client_that_goes_while_it_waits_for_a_whole_answer(
    replica: FakeReplica, make_app: MakeApp, body: dict[str, Any], script: Script
) -> None:
    replica.scripts = [script]
    exchange = Exchange(make_app(replica), "POST", "/v1/chat/completions", body)
    async with asyncio.timeout(60):
        while len(replica.requests) < body.get("n", 1):  # noqa: ASYNC110 - the replica is a fake without an event
            await asyncio.sleep(0)
    exchange.disconnect()
    await exchange.end()
    assert replica.cancelled == body.get("n", 1)
    assert exchange.sent == []


async def test_a_connection_that_fails_to_send_stops_the_work(replica: FakeReplica, make_app: MakeApp) -> None:
    replica.scripts = [says(tokens(0, 84), 0.02, tokens(1, 85), None)]
    exchange = Exchange(make_app(replica), "POST", "/stream", HI)
    await exchange.until(b"data: ")
    exchange.send_error = OSError("broken pipe")
    await exchange.end()
    assert replica.cancelled == 1


async def test_a_server_that_cancels_the_request_stops_the_work(replica: FakeReplica, make_app: MakeApp) -> None:
    replica.scripts = [says(tokens(0, 84), None)]
    exchange = Exchange(make_app(replica), "POST", "/stream", HI)
    await exchange.until(b"data: ")
    exchange.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await exchange.task
    assert replica.cancelled == 1


async def test_closing_the_connection_at_a_real_server_stops_the_work(
    replica: FakeReplica, make_app: MakeApp, serve: Any, metrics: MemoryMetrics
) -> None:
    replica.scripts = [says(tokens(0, 84), None)]
    url = await serve(make_app(replica))
    async with httpx.AsyncClient(timeout=60) as client, client.stream("POST", f"{url}/stream", json=HI) as response:
        assert "token_id" in await anext(response.aiter_text())
    async with asyncio.timeout(60):
        while not metrics.counters:  # noqa: ASYNC110 - the request has ended once it is counted
            await asyncio.sleep(0.001)
    assert replica.cancelled == 1
    assert metrics.counters["serve_app_requests", ("/stream", "disconnected")] == 1


async def test_one_request_too_many_is_refused_at_once(replica: FakeReplica, make_app: MakeApp, http: Any) -> None:
    replica.scripts = [says(tokens(0, 84), None)]
    app = make_app(replica, max_streams=2)
    held = [Exchange(app, "POST", "/stream", HI) for _ in range(2)]
    for exchange in held:
        await exchange.until(b"data: ")
    client: httpx.AsyncClient = http(app)
    response = await client.post("/stream", json=HI)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "overloaded"
    assert response.headers["retry-after"] == "1"
    assert (await client.get("/health")).status_code == 200
    held[0].disconnect()
    await held[0].end()
    again = Exchange(app, "POST", "/stream", HI)
    await again.until(b"data: ")
    for exchange in (held[1], again):
        exchange.disconnect()
        await exchange.end()


async def test_places_come_back_after_every_kind_of_end(
    api: httpx.AsyncClient, replica: FakeReplica, metrics: MemoryMetrics
) -> None:
    await api.post("/stream", json=HI)
    await api.post("/stream", json={})
    replica.scripts = [says(Failure(FailureCode.OVERLOADED, "No."))]
    await api.post("/stream", json=HI)
    replica.scripts = [says(ZeroDivisionError())]
    await api.post("/stream", json=HI)
    assert metrics.gauges["serve_app_requests_in_progress", ()] == 0
    outcomes = {tags[1]: count for (name, tags), count in metrics.counters.items() if name == "serve_app_requests"}
    assert outcomes == {"stop": 1, "invalid_value": 1, "overloaded": 1, "internal_error": 1}


@pytest.mark.parametrize(("given", "remaining_s"), [(None, 60), ("2.5", 2.5), ("1e9", 60)])
async def test_a_client_may_shorten_the_time_of_its_request(
    replica: FakeReplica, make_app: MakeApp, http: Any, given: str | None, remaining_s: float
) -> None:
    replica.scripts = [says(tokens(0, 84, finish=FinishReason.LENGTH))]
    headers = {} if given is None else {"X-Request-Timeout": given}
    response = await http(make_app(replica, request_timeout_s=60)).post("/stream", json=HI, headers=headers)
    assert response.status_code == 200
    assert remaining_s - 1 < (replica.requests[0].remaining_s or 0) <= remaining_s


@pytest.mark.parametrize("given", ["0", "-1", "nan", "10 s", ""])
async def test_a_time_that_is_none_is_refused(api: httpx.AsyncClient, given: str) -> None:
    response = await api.post("/stream", json=HI, headers={"X-Request-Timeout": given})
    assert response.status_code == 400
    assert "a number of seconds" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [(FailureCode.OVERLOADED, 503, "server_error"), (FailureCode.OVER_SHARE, 429, "requests")],
)
async def test_what_would_not_start_in_time_is_refused_before_it_is_read(
    replica: FakeReplica, make_app: MakeApp, http: Any, code: FailureCode, status: int, kind: str
) -> None:
    def full(tenant: str, weight: float, remaining_s: float) -> Failure | None:
        return Failure(code, "It would wait.", retry_after_s=7.2) if remaining_s <= 60 else None

    client: httpx.AsyncClient = http(make_app(replica, full=full, request_timeout_s=60))
    for path, body in (*STREAMS, ("/stream", {"nonsense": True}), ("/v1/responses", {"input": "Hi"})):
        response = await client.post(path, json=body)
        assert (response.status_code, response.headers["retry-after"]) == (status, "8"), path
    error = (await client.post("/v1/completions", json={"prompt": "Hi"})).json()["error"]
    assert (error["code"], error["type"]) == (code, kind)
    assert replica.requests == []
    assert (await client.post("/tokenize", json={"prompt": "Hi"})).status_code == 200, "it needs no replica"


async def test_the_deadline_of_a_request(replica: FakeReplica, make_app: MakeApp, http: Any) -> None:
    client: httpx.AsyncClient = http(make_app(replica, request_timeout_s=0.05))
    with simulated_time():
        replica.scripts = [says(None)]
        response = await client.post("/stream", json=HI)
        assert response.status_code == 504
        replica.scripts = [says(tokens(0, 84), None)]
        response = await client.post("/stream", json=HI)
    assert response.status_code == 200
    assert "event: error" in response.text
    assert "deadline_exceeded" in response.text
    assert replica.cancelled == 2
