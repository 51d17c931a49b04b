"""What a key decides: models, cached prefixes, the place in queues, and whose streams and responses are whose."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_keys import KEY, bearer, entry, guard_of
from asgi_driver import Exchange
from fake_replica import FakeReplica
from memory_metrics import MemoryMetrics
from starlette.applications import Starlette

from serve_app.access.keys import new_key
from serve_app.api.http.guard import Guard
from serve_app.core import GenerationRequest
from serve_app.observability import metrics as m

HI = {"messages": [{"role": "user", "content": "Hi"}], "seed": 7}
RENEWED, BOB, LIMITED = new_key(), new_key(), new_key()
Http = Callable[[Starlette], httpx.AsyncClient]
MakeApp = Callable[..., Starlette]


@pytest.fixture
def guard(tmp_path: Path) -> Guard:
    """alice has two keys of the tenant research; bob has his own; limited may use no model that is served."""
    return guard_of(
        tmp_path / "keys.yaml",
        entry("alice", KEY, tenant="research"),
        entry("renewed", RENEWED, tenant="research"),
        entry("bob", BOB),
        entry("limited", LIMITED, models=["another"]),
        tenants={"research": {"weight": 2.5}},
    )


@pytest.fixture
def app(replica: FakeReplica, make_app: MakeApp, guard: Guard) -> Starlette:
    return make_app(replica, guard=guard)


@pytest.fixture
def api(app: Starlette, http: Http) -> httpx.AsyncClient:
    return http(app)


GENERATING: list[tuple[str, dict[str, Any]]] = [
    ("/stream", HI),
    ("/v1/chat/completions", HI),
    ("/v1/completions", {"prompt": "Hi", "seed": 7}),
    ("/v1/messages", {**HI, "max_tokens": 5}),
    ("/v1/responses", {"input": "Hi", "store": False}),
    ("/v1/responses", {"input": "Hi"}),
    ("/v1/responses", {"input": "Hi", "background": True}),
    ("/v1/responses/compact", {"input": "Hi"}),
]
READING: list[tuple[str, dict[str, Any]]] = [
    ("/tokenize", {"prompt": "Hi"}),
    ("/detokenize", {"tokens": [1]}),
    ("/v1/chat/completions/render", HI),
    ("/v1/completions/render", {"prompt": "Hi"}),
    ("/v1/messages/count_tokens", HI),
    ("/v1/responses/input_tokens", {"input": "Hi"}),
]


@pytest.mark.parametrize(("path", "body"), GENERATING)
async def test_every_generation_is_its_tenants(
    api: httpx.AsyncClient, replica: FakeReplica, path: str, body: dict[str, Any]
) -> None:
    async def asked(key: str, **fields: object) -> GenerationRequest:
        before = len(replica.requests)
        answer = await api.post(path, json={**body, **fields}, headers=bearer(key))
        assert answer.status_code == 200, answer.text
        if "background" in body:
            await api.get(f"{path}/{answer.json()['id']}?stream=true", headers=bearer(key))
        return replica.requests[before]

    alice, renewed, bob = await asked(KEY), await asked(RENEWED), await asked(BOB)
    assert (alice.tenant, alice.weight, bob.tenant, bob.weight) == ("research", 2.5, "bob", 1.0)
    assert alice.cache_salt == renewed.cache_salt != bob.cache_salt
    if path in ("/stream", "/v1/chat/completions"):
        salted = await asked(KEY, cache_salt="s")
        assert salted.cache_salt != alice.cache_salt
        assert salted.cache_salt == (await asked(RENEWED, cache_salt="s")).cache_salt
        assert salted.cache_salt != (await asked(BOB, cache_salt="s")).cache_salt


async def test_without_keys_nothing_is_changed(replica: FakeReplica, make_app: MakeApp, http: Http) -> None:
    await http(make_app(replica)).post("/stream", json={**HI, "cache_salt": "s"}, headers=bearer())
    (request,) = replica.requests
    assert (request.tenant, request.weight, request.cache_salt) == ("", 1.0, "s")


@pytest.mark.parametrize(("path", "body"), [*GENERATING, *READING])
async def test_a_key_may_use_its_models_only(
    api: httpx.AsyncClient, replica: FakeReplica, path: str, body: dict[str, Any]
) -> None:
    refused = await api.post(path, json=body, headers=bearer(LIMITED))
    assert (refused.status_code, "may not use the model 'tiny'" in refused.text) == (403, True)
    assert not replica.requests


@pytest.mark.parametrize("headers", [{}, {"anthropic-version": "2023-06-01"}])
async def test_only_its_models_are_listed(api: httpx.AsyncClient, headers: dict[str, str]) -> None:
    assert (await api.get("/v1/models", headers={**headers, **bearer(LIMITED)})).json()["data"] == []
    assert (await api.get("/v1/models/tiny", headers={**headers, **bearer(LIMITED)})).status_code == 403
    assert (await api.get("/v1/models/other", headers={**headers, **bearer(LIMITED)})).status_code == 404
    assert len((await api.get("/v1/models", headers={**headers, **bearer(BOB)})).json()["data"]) == 1
    assert (await api.get("/tokenizer_info", headers={**headers, **bearer(LIMITED)})).status_code == 403


async def test_a_model_is_allowed_by_any_of_its_names(
    replica: FakeReplica, make_app: MakeApp, http: Http, guard: Guard
) -> None:
    api = http(make_app(replica, guard=guard, aliases=frozenset({"another"})))
    assert (await api.post("/v1/chat/completions", json=HI, headers=bearer(LIMITED))).status_code == 200


async def test_a_renewed_key_finds_its_tenants_streams_alone(app: Starlette, api: httpx.AsyncClient) -> None:
    begun = await api.post("/stream", json=HI, headers={**bearer(), "x-stream-resume": "1"})
    path = f"/v1/streams/{begun.headers['x-stream-id']}"
    for headers, status in ((bearer(RENEWED), 200), ({"x-api-key": RENEWED}, 200), (bearer(BOB), 404), ({}, 401)):
        exchange = Exchange(app, "GET", path, headers=headers)
        await exchange.end()
        assert exchange.status == status


async def test_and_so_with_responses(api: httpx.AsyncClient) -> None:
    made = await api.post("/v1/responses", json={"input": "Hi"}, headers=bearer())
    path = f"/v1/responses/{made.json()['id']}"
    assert (await api.get(path, headers=bearer(RENEWED))).json() == made.json()
    assert (await api.get(path, headers=bearer(BOB))).status_code == 404
    assert (await api.delete(path, headers=bearer(BOB))).status_code == 404
    assert (await api.get(path, headers={"x-api-key": KEY})).status_code == 200


async def test_tokens_of_a_background_response_count_for_its_key(
    api: httpx.AsyncClient, metrics: MemoryMetrics
) -> None:
    made = await api.post("/v1/responses", json={"input": "Hi", "background": True}, headers=bearer())
    path = f"/v1/responses/{made.json()['id']}?stream=true"
    assert "response.completed" in (await api.get(path, headers=bearer())).text
    async with asyncio.timeout(10):
        while metrics.counters[m.KEY_TOKENS.name, ("research", "alice", "output")] < 3:  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.001)
