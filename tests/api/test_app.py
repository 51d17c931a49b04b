from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from asgi_driver import Exchange
from fake_replica import FakeReplica, says, tokens
from memory_metrics import MemoryMetrics
from starlette.applications import Starlette

from serve_app.core import LoadStage
from serve_app.observability.logs import request_id_var

HI = {"messages": [{"role": "user", "content": "Hi"}]}
MakeApp = Callable[..., Starlette]


async def test_health_says_only_that_the_process_lives(api: httpx.AsyncClient, replica: FakeReplica) -> None:
    replica.state = LoadStage("loading weights", 0.5)
    response = await api.get("/health")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


async def test_ready_shows_the_card(api: httpx.AsyncClient) -> None:
    response = await api.get("/ready")
    assert response.status_code == 200
    assert response.json()["status"] == "ready"
    assert response.json()["model"]["context_tokens"] == 256
    # OpenAI's, as the model here says none.
    generation = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert response.json()["generation"] == generation


async def test_ready_shows_how_far_loading_is(api: httpx.AsyncClient, replica: FakeReplica) -> None:
    replica.state = LoadStage("loading weights", 0.5)
    response = await api.get("/ready")
    assert response.status_code == 503
    assert response.json() == {"status": "loading", "stage": "loading weights", "fraction": 0.5, "error": None}
    assert response.headers["retry-after"] == "2"
    replica.state = LoadStage("failed", error="No space left in the cache folder.")
    response = await api.get("/ready")
    assert (response.json()["status"], response.json()["error"]) == ("failed", "No space left in the cache folder.")


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/stream"), ("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/v1/models/tiny")],
)
async def test_nothing_is_served_while_loading(
    api: httpx.AsyncClient, replica: FakeReplica, method: str, path: str
) -> None:
    replica.state = LoadStage("loading weights", 0.5)
    response = await api.request(method, path, json=HI if method == "POST" else None)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "not_ready"
    assert "loading weights" in response.json()["error"]["message"]
    assert response.headers["retry-after"] == "5"


async def test_a_model_that_failed_for_good_promises_nothing(api: httpx.AsyncClient, replica: FakeReplica) -> None:
    replica.state = LoadStage("failed", error="No space left.")
    response = await api.post("/stream", json=HI)
    assert response.status_code == 503
    assert "No space left." in response.json()["error"]["message"]
    assert "retry-after" not in response.headers


async def test_models(api: httpx.AsyncClient, replica: FakeReplica) -> None:
    body = (await api.get("/v1/models")).json()
    assert body["object"] == "list"
    (model,) = body["data"]
    assert model == {"id": "tiny", "object": "model", "created": model["created"], "owned_by": "serve_app"}
    assert (await api.get("/v1/models/tiny")).json() == model
    response = await api.get("/v1/models/org/other")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


async def test_head_generates_nothing(api: httpx.AsyncClient, replica: FakeReplica) -> None:
    assert (await api.head("/stream?prompt=Hi")).status_code == 405
    assert replica.requests == []


@pytest.mark.parametrize("given", ["abc-1._Z", "a" * 128])
async def test_a_request_id_comes_back_and_reaches_the_replica(
    api: httpx.AsyncClient, replica: FakeReplica, given: str
) -> None:
    response = await api.post("/stream", json=HI, headers={"x-request-id": given})
    assert response.headers["x-request-id"] == given
    assert replica.requests[0].request_id == given


@pytest.mark.parametrize("given", ["", "a b", "a" * 129, "<script>", "a\tb"])
async def test_a_bad_request_id_is_replaced(api: httpx.AsyncClient, replica: FakeReplica, given: str) -> None:
    response = await api.post("/stream", json=HI, headers={"x-request-id": given})
    assert response.headers["x-request-id"] not in ("", given)
    assert replica.requests[0].request_id == response.headers["x-request-id"]


async def test_disconnect_detection_can_not_be_switched_off(api: httpx.AsyncClient, replica: FakeReplica) -> None:
    response = await api.post("/stream", json=HI, headers={"x-request-disconnect-disabled": "?1"})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "unsupported_header"
    assert response.headers["x-request-id"]
    assert replica.requests == []


async def test_one_access_line_a_request_without_its_text(
    api: httpx.AsyncClient, replica: FakeReplica, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "serve_app.access"):
        await api.post("/stream", json={"prompt": "Confidential"}, headers={"x-request-id": "abc"})
        await api.get("/health")
        await api.get("/ready")
    (line,) = [record.getMessage() for record in caplog.records if record.name == "serve_app.access"]
    prompt_tokens = len(replica.requests[0].prompt_token_ids)
    assert line.startswith("request_id=abc endpoint=/stream status=200 outcome=stop ")
    assert f" prompt_tokens={prompt_tokens} cached_prompt_tokens=2 output_tokens=" in line
    assert re.search(r" ttft_s=\d+\.\d{3} ", line)
    assert "Confidential" not in line
    assert request_id_var.get() == "-"


async def test_metrics_of_a_request(api: httpx.AsyncClient, replica: FakeReplica, metrics: MemoryMetrics) -> None:
    await api.post("/stream", json=HI)
    assert metrics.counters["serve_app_requests", ("/stream", "stop")] == 1
    assert metrics.counters["serve_app_prompt_tokens", ()] == len(replica.requests[0].prompt_token_ids)
    assert metrics.counters["serve_app_prefix_cache_hits", ()] == 2
    assert metrics.counters["serve_app_generation_tokens", ()] > 5
    assert len(metrics.observations["serve_app_time_to_first_token_seconds", ("/stream",)]) == 1
    assert len(metrics.observations["serve_app_inter_token_latency_seconds", ("/stream",)]) == 1


async def test_what_generates_nothing_and_is_answered_is_ok(
    replica: FakeReplica, make_app: MakeApp, http: Any, metrics: MemoryMetrics
) -> None:
    api: httpx.AsyncClient = http(make_app(replica, cors_origins=["http://localhost:3000"]))
    await api.get("/v1/models")
    await api.get("/v1/models/tiny")
    for origin in ("http://localhost:3000", "http://evil.example"):
        await api.options("/stream", headers={"origin": origin, "access-control-request-method": "POST"})
    await api.get("/nothing")
    assert {key[1]: count for key, count in metrics.counters.items() if key[0] == "serve_app_requests"} == {
        ("/v1/models", "ok"): 1,
        ("/v1/models/{model:path}", "ok"): 1,
        ("-", "ok"): 1,
        ("-", "origin_not_allowed"): 1,
        ("-", "not_found"): 1,
    }


@pytest.mark.parametrize("headers", [{}, {"X-Stream-Resume": "1"}], ids=["plain", "resumable"])
async def test_a_stream_that_its_client_cut_is_disconnected(
    replica: FakeReplica, make_app: MakeApp, metrics: MemoryMetrics, headers: dict[str, str]
) -> None:
    replica.scripts = [says(tokens(0, 84), None)]
    exchange = Exchange(make_app(replica), "POST", "/stream", HI, headers)
    await exchange.until(b"data: ")
    exchange.disconnect()
    await exchange.end()
    assert metrics.counters["serve_app_requests", ("/stream", "disconnected")] == 1


async def test_a_refused_request_counts_no_tokens(
    api: httpx.AsyncClient, replica: FakeReplica, metrics: MemoryMetrics
) -> None:
    replica.scripts = [says(ZeroDivisionError())]
    await api.post("/stream", json=HI)
    assert metrics.counters["serve_app_requests", ("/stream", "internal_error")] == 1
    assert ("serve_app_prompt_tokens", ()) not in metrics.counters
