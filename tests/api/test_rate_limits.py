"""Limits of keys and tenants over HTTP: what is counted, given back, refused and told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from api_keys import KEY, bearer, entry, guard_of
from asgi_driver import Exchange
from fake_replica import FakeReplica, Script
from limited_callers import Clock, TrustingGuard, as_caller, caller, used
from memory_metrics import MemoryMetrics
from starlette.applications import Starlette

from serve_app.access.caller import ANONYMOUS, Limits
from serve_app.access.keys import new_key
from serve_app.access.memory_quotas import MemoryQuotas, MemoryQuotaStore
from serve_app.access.quotas import Answer, Ask, QuotaUnavailable, Renew, Settle
from serve_app.access.reservations import Quotas
from serve_app.api.grpc.refusal import of_answer
from serve_app.api.limit_headers import duration
from serve_app.core import Failure, FailureCode

MakeApp = Callable[..., Starlette]
Writes = Callable[..., Script]
Http = Callable[[Any], httpx.AsyncClient]

HI: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "seed": 7}
RESUME = {"X-Stream-Resume": "1"}
CHAT = "/v1/chat/completions"
PLENTY = {"requests_per_minute": 1000, "tokens_per_minute": 100_000, "tokens_per_day": 100_000, "streams": 100}
FORMATS: list[tuple[str, dict[str, Any], dict[str, str]]] = [
    ("/stream", HI, {}),
    ("/stream", HI, RESUME),
    (CHAT, HI, {}),
    (CHAT, {**HI, "stream": True, "n": 3}, {}),
    (CHAT, {**HI, "stream": True, "n": 2}, RESUME),
    ("/v1/completions", {"prompt": ["Once", "Twice"], "n": 2}, {}),
    ("/v1/messages", {**HI, "stream": True, "max_tokens": 100}, {}),
    ("/v1/responses", {"input": "Hi"}, {}),
    ("/v1/responses", {"input": "Hi", "store": False, "stream": True}, {}),
    ("/v1/responses", {"input": "Hi", "stream": True}, {}),
    ("/v1/responses", {"input": "Hi", "background": True}, {}),
    ("/v1/responses/compact", {"input": "Hi"}, {}),
]


@pytest.fixture
def counters() -> MemoryQuotas:
    return MemoryQuotas(clock=Clock())


@pytest.fixture
def quotas(counters: MemoryQuotas, metrics: MemoryMetrics) -> Quotas:
    return Quotas(MemoryQuotaStore(counters), metrics)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - of things that tell nobody
            await asyncio.sleep(0.001)


@pytest.mark.parametrize(("path", "body", "headers"), FORMATS)
async def test_a_request_has_used_its_prompt_and_its_answer(
    replica: FakeReplica, make_app: MakeApp, quotas: Quotas, counters: MemoryQuotas, path: str, body: Any, headers: Any
) -> None:
    app = as_caller(
        make_app(replica, guard=TrustingGuard(), quotas=quotas),
        caller(**PLENTY, tenant=Limits(tokens_per_minute=100_000)),
    )
    exchange = Exchange(app, "POST", path, body, headers)
    await exchange.end()
    assert exchange.status == 200
    await until(lambda: not used(counters)["streams"])
    prompts = {request.choice: request.prompt_token_ids for request in replica.requests}
    choices = len(prompts)
    of_prompts = sum(map(len, prompts.values())) // (body.get("n", 1))
    answer = len(replica.scripts[0](replica.requests[0]))
    expected = of_prompts + choices * answer
    assert used(counters) == {"requests": 1, "tokens": expected, "tokens_day": expected, "streams": 0}
    assert used(counters, "tenant office")["tokens"] == expected


@pytest.mark.parametrize(("path", "body", "headers"), FORMATS)
async def test_a_request_that_ends_at_any_point_holds_nothing(
    replica: FakeReplica,
    make_app: MakeApp,
    writes: Writes,
    quotas: Quotas,
    counters: MemoryQuotas,
    path: str,
    body: Any,
    headers: Any,
) -> None:
    """What goes on without its client ends by itself here, since the answer is short."""
    replica.scripts = [writes(pause_s=0.0)]
    app = make_app(replica, guard=TrustingGuard(), quotas=quotas)
    for steps in range(0, 90, 3):
        name = f"key {steps}"
        exchange = Exchange(as_caller(app, caller(name=name, **PLENTY)), "POST", path, body, headers)
        for _ in range(steps):
            await asyncio.sleep(0)
        exchange.disconnect() if steps % 2 else exchange.task.cancel()
        await asyncio.wait({exchange.task})
    await until(lambda: not quotas._leases)
    for steps in range(0, 90, 3):
        left = used(counters, f"key key {steps}")
        assert left["streams"] == 0
        assert left["requests"] <= 1


async def test_what_failed_before_its_first_token_has_used_nothing_but_a_request(
    replica: FakeReplica, make_app: MakeApp, http: Http, quotas: Quotas, counters: MemoryQuotas
) -> None:
    replica.scripts = [lambda request: [Failure(FailureCode.OVERLOADED, "Full.")]]
    api = http(as_caller(make_app(replica, guard=TrustingGuard(), quotas=quotas), caller(**PLENTY)))
    for path, body, headers in FORMATS:
        assert (await api.post(path, json=body, headers=headers)).status_code == 503, path
    assert (await api.post(CHAT, json={"messages": 7})).status_code == 400
    await until(lambda: used(counters)["requests"] == len(FORMATS) + 1 and not used(counters)["streams"])
    assert used(counters)["tokens"] == 0


async def test_an_openai_client_sees_what_is_left_and_when_to_come_again(
    replica: FakeReplica, make_app: MakeApp, http: Http, quotas: Quotas, metrics: MemoryMetrics
) -> None:
    who = caller(requests_per_minute=2, tokens_per_minute=100_000, tenant=Limits(tokens_per_minute=1000))
    api = http(as_caller(make_app(replica, guard=TrustingGuard(), quotas=quotas), who))
    first = await api.post(CHAT, json={**HI, "max_tokens": 50})
    told = {name: value for name, value in first.headers.items() if "ratelimit" in name}
    prompt = first.json()["usage"]["prompt_tokens"]
    assert told == {
        "x-ratelimit-limit-requests": "2",
        "x-ratelimit-remaining-requests": "1",
        "x-ratelimit-reset-requests": "2m0s",
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": str(1000 - prompt - 50),
        "x-ratelimit-reset-tokens": "2m0s",
    }
    assert (await api.get("/v1/models")).headers["x-ratelimit-remaining-requests"] == "0"
    for path in (CHAT, "/tokenize"):
        refused = await api.post(path, json=HI if path == CHAT else {"prompt": "Hi"})
        assert refused.status_code == 429
        error = refused.json()["error"]
        assert (error["type"], error["code"], error["param"]) == ("requests", "rate_limit_exceeded", None)
        assert error["message"].startswith(
            "Rate limit reached for the key laptop on requests per minute: limit 2, used 2, requested 1. Please try"
        )
        assert 59 <= float(refused.headers["retry-after"]) <= 61
        assert 59_000 <= int(refused.headers["retry-after-ms"]) <= 60_001
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert metrics.counters["serve_app_limited_requests", ("office", "requests")] == 2


async def test_an_anthropic_client_sees_it_in_its_own_shape(
    replica: FakeReplica, make_app: MakeApp, http: Http, quotas: Quotas
) -> None:
    api = http(
        as_caller(make_app(replica, guard=TrustingGuard(), quotas=quotas), caller(tokens_per_minute=100, streams=1))
    )
    body = {**HI, "max_tokens": 75}
    first = await api.post("/v1/messages", json=body)
    assert first.headers["anthropic-ratelimit-tokens-limit"] == "100"
    assert int(first.headers["anthropic-ratelimit-tokens-remaining"]) < 25
    assert first.headers["anthropic-ratelimit-tokens-reset"].endswith("Z")
    assert "x-ratelimit-limit-tokens" not in first.headers
    refused = await api.post("/v1/messages", json=body)
    assert refused.status_code == 429
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert "tokens per minute: limit 100" in refused.json()["error"]["message"]
    assert int(refused.headers["retry-after"]) >= 1


async def test_streams_at_once_are_limited_and_free_when_they_end(
    replica: FakeReplica, make_app: MakeApp, http: Http, writes: Writes, quotas: Quotas
) -> None:
    replica.scripts = [writes(pause_s=0.001)]
    app = as_caller(make_app(replica, guard=TrustingGuard(), quotas=quotas), caller(streams=1))
    first = Exchange(app, "POST", "/stream", HI)
    await first.until(b"data")
    refused = await http(app).post("/stream", json=HI)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert "has 1 of at most 1 requests in progress" in refused.json()["error"]["message"]
    assert (await http(app).get("/v1/models")).status_code == 200
    first.disconnect()
    await first.end()
    assert (await http(app).post("/stream", json=HI)).status_code == 200


@pytest.mark.parametrize(
    ("limits", "asked", "status", "told"),
    [
        ({"tokens_per_minute": 100}, {}, 200, "max_tokens=25"),
        ({"answer_tokens": 10}, {"max_tokens": 50}, 200, "max_tokens=10"),
        ({"answer_tokens": 10}, {"max_completion_tokens": 50}, 200, "max_completion_tokens=10"),
        ({"tokens_per_minute": 100}, {"max_tokens": 99}, 400, None),
        ({"context_tokens": 3}, {}, 400, None),
    ],
)
async def test_answers_are_cut_to_what_the_limits_can_hold(
    replica: FakeReplica,
    make_app: MakeApp,
    http: Http,
    quotas: Quotas,
    limits: Any,
    asked: Any,
    status: int,
    told: str | None,
) -> None:
    api = http(as_caller(make_app(replica, guard=TrustingGuard(), quotas=quotas), caller(**limits)))
    answer = await api.post(CHAT, json={**HI, **asked})
    assert (answer.status_code, answer.headers.get("x-clamped-fields")) == (status, told)
    shown = await api.post(f"{CHAT}/render", json={**HI, **asked})
    assert shown.status_code == status
    if told is not None:
        longest = int(told.partition("=")[2])
        assert shown.json()["prompts"][0]["max_tokens"] == longest
        assert replica.requests[0].max_new_tokens == longest


async def test_reading_on_costs_nothing_and_what_generates_nothing_costs_a_request(
    replica: FakeReplica, make_app: MakeApp, http: Http, quotas: Quotas, counters: MemoryQuotas
) -> None:
    app = as_caller(make_app(replica, guard=TrustingGuard(), quotas=quotas), caller(**PLENTY))
    api = http(app)
    begun = await api.post("/stream", json=HI, headers=RESUME)
    kept = (await api.post("/v1/responses", json={"input": "Hi"})).json()["id"]
    await until(lambda: not used(counters)["streams"])
    before = used(counters)
    stream_id = begun.headers["x-stream-id"]
    again = {**RESUME, "Last-Event-ID": f"{stream_id}:1"}
    assert (await api.get(f"/v1/streams/{stream_id}")).status_code == 200
    assert (await api.post("/stream", json=HI, headers=again)).status_code == 200
    assert (await api.get(f"/v1/responses/{kept}", params={"stream": "true"})).status_code == 200
    assert (await api.delete(f"/v1/responses/{kept}")).status_code == 200
    assert used(counters) == before
    await api.post(f"{CHAT}/render", json=HI)
    await api.post("/tokenize", json={"prompt": "Hi"})
    await api.get("/v1/models")
    await api.post("/v1/messages/count_tokens", json=HI)
    assert used(counters) == {**before, "requests": before["requests"] + 4}


async def test_a_stream_that_stopped_may_go_on_later_so_it_keeps_all_it_reserved(
    replica: FakeReplica, make_app: MakeApp, writes: Writes, quotas: Quotas, counters: MemoryQuotas
) -> None:
    replica.scripts = [writes(pause_s=0.001)]
    app = as_caller(make_app(replica, guard=TrustingGuard(), quotas=quotas), caller(**PLENTY))
    exchange = Exchange(app, "POST", "/v1/responses", {"input": "Hi", "stream": True, "max_output_tokens": 30})
    await exchange.until(b"output_text.delta")
    exchange.disconnect()
    await exchange.end()
    await until(lambda: not used(counters)["streams"])
    assert used(counters)["tokens"] == len(replica.requests[0].prompt_token_ids) + 30


class _Broken:
    """A store that can't be reached."""

    lease_s: float | None = 30.0

    def __init__(self) -> None:
        self.heard: list[Any] = []

    async def ask(self, ask: Ask) -> Answer:
        self.heard.append(ask)
        raise QuotaUnavailable("gone")

    def tell(self, message: Settle | Renew) -> None:
        self.heard.append(message)

    async def aclose(self) -> None:
        pass


async def test_without_the_store_requests_go_on_and_are_counted_as_unlimited(
    replica: FakeReplica, make_app: MakeApp, http: Http, metrics: MemoryMetrics, caplog: pytest.LogCaptureFixture
) -> None:
    store = _Broken()
    quotas = Quotas(store, metrics)
    api = http(as_caller(make_app(replica, guard=TrustingGuard(), quotas=quotas), caller(**PLENTY)))
    for _ in range(2):
        answer = await api.post(CHAT, json=HI)
        assert answer.status_code == 200
        assert not [name for name in answer.headers if "ratelimit" in name]
    assert metrics.counters["serve_app_unlimited_requests", ()] == 2
    assert caplog.text.count("can't be reached, so requests are not limited: gone") == 1
    assert [type(each).__name__ for each in store.heard] == ["Ask", "Settle"] * 2  # it may have counted them
    await quotas.aclose()


async def test_a_caller_without_limits_asks_no_store(
    replica: FakeReplica, make_app: MakeApp, http: Http, metrics: MemoryMetrics
) -> None:
    store = _Broken()
    app = make_app(replica, guard=TrustingGuard(), quotas=Quotas(store, metrics))
    for who in (ANONYMOUS, caller(answer_tokens=1000)):
        answer = await http(as_caller(app, who)).post(CHAT, json=HI)
        assert answer.status_code == 200
        assert not [name for name in answer.headers if "ratelimit" in name]
    assert store.heard == []


async def test_over_grpc_a_refusal_is_exhaustion(
    replica: FakeReplica, make_app: MakeApp, http: Http, quotas: Quotas
) -> None:
    """What the gRPC side makes of the application's answer."""
    api = http(as_caller(make_app(replica, guard=TrustingGuard(), quotas=quotas), caller(requests_per_minute=1)))
    await api.post("/stream", json=HI)
    refused = await api.post("/stream", json=HI)
    status = of_answer(refused.status_code, refused.content, refused.headers)
    assert status.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    details = json.loads(status.details)
    assert details["error"]["code"] == "rate_limit_exceeded"
    assert details["retry_after_s"] == int(refused.headers["retry-after"])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.0204, "20ms"), (1, "1s"), (1.5, "1.5s"), (360, "6m0s"), (86_348, "23h59m8s"), (3600, "1h0m0s")],
)
def test_durations_are_openais(seconds: float, text: str) -> None:
    assert duration(seconds) == text


async def test_keys_of_a_file_have_the_limits_of_the_file(
    replica: FakeReplica, make_app: MakeApp, http: Http, quotas: Quotas, tmp_path: Path
) -> None:
    """Each key has its own, and both share those of their tenant."""
    other = new_key()
    keys = [
        entry("laptop", KEY, tenant="office", limits={"requests_per_minute": 1}),
        entry("phone", other, tenant="office"),
    ]
    guard = guard_of(tmp_path / "keys.yaml", *keys, tenants={"office": {"limits": {"requests_per_minute": 3}}})
    api = http(make_app(replica, guard=guard, quotas=quotas))
    told: list[tuple[int, str]] = []
    for key in (KEY, KEY, other, other, other):
        answer = await api.post(CHAT, json=HI, headers=bearer(key))
        message = "" if answer.status_code == 200 else answer.json()["error"]["message"]
        told.append((answer.status_code, message.partition(" on ")[0].removeprefix("Rate limit reached for ")))
    assert told == [(200, ""), (429, "the key laptop"), (200, ""), (200, ""), (429, "the tenant office")]
