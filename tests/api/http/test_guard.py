"""API keys at the door: every path asks for one, in the words of each client, and nobody tries many."""

from __future__ import annotations

import base64
import logging
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
from api_keys import KEY, bearer, entry, guard_of, write_keys
from asgi_driver import Exchange
from fake_replica import FakeReplica
from memory_metrics import MemoryMetrics
from starlette.applications import Starlette
from starlette.routing import Route

from serve_app.access.guessing import WRONG_KEYS
from serve_app.access.keys import VARIABLE, ApiKeys, new_key
from serve_app.api.http.guard import Guard
from serve_app.api.http.loading import create_loading_app
from serve_app.api.http.pages import Pages
from serve_app.config import ApiConfig
from serve_app.core import LoadStage
from serve_app.observability import metrics as m

HI = {"messages": [{"role": "user", "content": "Hi"}]}
CHAT = "/v1/chat/completions"
MakeApp = Callable[..., Starlette]
Serve = Callable[[Starlette], Awaitable[str]]
Http = Callable[[Starlette], httpx.AsyncClient]


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


@pytest.fixture
def guard(keys_file: Path) -> Guard:
    return guard_of(keys_file, probe_secret="probe")


@pytest.fixture
def app(replica: FakeReplica, make_app: MakeApp, guard: Guard) -> Starlette:
    return make_app(replica, guard=guard)


@pytest.fixture
def api(app: Starlette, http: Http) -> httpx.AsyncClient:
    return http(app)


@pytest.fixture
def loading(guard: Guard, http: Http) -> httpx.AsyncClient:
    async def stage() -> LoadStage:
        return LoadStage("loading weights")

    return http(create_loading_app(stage, MemoryMetrics(), Pages(ApiConfig()), guard))


def requests_of(app: Starlette) -> Iterator[tuple[str, str]]:
    """Each method of each path, and paths that do not exist."""
    for route in app.routes:
        assert isinstance(route, Route)
        path = route.path.replace("{", "").replace(":path}", "").replace("}", "")
        yield from ((method, path) for method in sorted(route.methods or {"GET", "POST"}))
    yield from [("GET", "/"), ("GET", "/metrics"), ("PATCH", CHAT), ("OPTIONS", CHAT), ("POST", "/v1/embeddings")]
    yield from [("GET", "/health/"), ("GET", "//health"), ("GET", "/health/x"), ("GET", "/v1/../health")]


async def test_nothing_but_health_and_the_chat_page_is_answered_without_a_key(
    app: Starlette, api: httpx.AsyncClient, loading: httpx.AsyncClient, replica: FakeReplica
) -> None:
    asked = list(requests_of(app))
    assert len(asked) > 30
    for method, path in asked:
        for headers in ({}, bearer("sa-wrong"), {"x-api-key": ""}, {"authorization": f"Basic {_basic(KEY)}"}):
            page = path.startswith(("/docs", "/openapi.json")) and method in ("GET", "HEAD")
            if page and "Basic" in headers.get("authorization", ""):
                continue
            for client in (api, loading):
                exchange = Exchange(client._transport.app, method, path, HI, headers)  # type: ignore[attr-defined]
                await exchange.end()
                open_to_all = path.rstrip("/") == "/health" or (path == "/" and method in ("GET", "HEAD"))
                assert (exchange.status == 401) is not open_to_all, (method, path, headers)
    assert not replica.requests


async def test_a_key_opens_them(api: httpx.AsyncClient, loading: httpx.AsyncClient) -> None:
    for headers in (bearer(), {"x-api-key": KEY}, {"authorization": f"bearer  {KEY} "}):
        assert (await api.post(CHAT, json={**HI, "model": ""}, headers=headers)).status_code == 200
        assert (await loading.get("/ready", headers=headers)).status_code == 503
    assert (await api.get("/nowhere", headers=bearer())).status_code == 404


async def test_without_keys_nobody_needs_one(replica: FakeReplica, make_app: MakeApp, http: Http) -> None:
    api = http(make_app(replica, guard=Guard(bound_to="127.0.0.1")))
    assert (await api.get("/v1/models", headers=bearer("unused"))).status_code == 200
    assert (await api.get("/ready")).json()["access"] == {"keys_required": False}


async def test_what_a_refusal_says(api: httpx.AsyncClient) -> None:
    none, wrong = await api.post(CHAT, json=HI), await api.post(CHAT, json=HI, headers=bearer("sa-wrong-key"))
    assert none.headers["www-authenticate"] == 'Bearer realm="serve_app"'
    assert wrong.headers["www-authenticate"] == 'Bearer realm="serve_app", error="invalid_token"'
    for answer in (none, wrong):
        error = answer.json()["error"]
        assert (error["code"], error["type"]) == ("invalid_api_key", "invalid_request_error")
        assert "sa-wrong-key" not in answer.text
        assert answer.headers["x-request-id"]


async def test_official_clients_raise_their_own_errors(
    make_app: MakeApp, serve: Serve, replica: FakeReplica, keys_file: Path
) -> None:
    limited = new_key()
    guard = guard_of(keys_file, entry("alice", KEY), entry("limited", limited, models=["another"]))
    url = await serve(make_app(replica, guard=guard))

    def clients(key: str) -> tuple[openai.AsyncOpenAI, anthropic.AsyncAnthropic]:
        return (
            openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key),
            anthropic.AsyncAnthropic(base_url=url, api_key=key),
        )

    messages: list[Any] = HI["messages"]
    of_openai, of_anthropic = clients("sa-wrong")
    with pytest.raises(openai.AuthenticationError) as theirs:
        await of_openai.chat.completions.create(model="tiny", messages=messages)
    assert theirs.value.code == "invalid_api_key"
    with pytest.raises(anthropic.AuthenticationError) as others:
        await of_anthropic.messages.create(model="tiny", messages=messages, max_tokens=5)
    assert others.value.body["error"]["type"] == "authentication_error"  # type: ignore[index]
    of_openai, of_anthropic = clients(limited)
    with pytest.raises(openai.PermissionDeniedError) as forbidden:
        await of_openai.chat.completions.create(model="tiny", messages=messages)
    assert forbidden.value.code == "model_not_allowed"
    with pytest.raises(anthropic.PermissionDeniedError):
        await of_anthropic.messages.create(model="tiny", messages=messages, max_tokens=5)
    of_openai, of_anthropic = clients(KEY)
    model = replica.state.name  # type: ignore[union-attr]
    assert (await of_openai.chat.completions.create(model=model, messages=messages)).choices
    assert (await of_anthropic.messages.create(model=model, messages=messages, max_tokens=5)).content


def _basic(key: str, user: str = "me") -> str:
    return base64.b64encode(f"{user}:{key}".encode()).decode()


async def test_a_browser_shows_the_pages_with_a_key_as_password(api: httpx.AsyncClient) -> None:
    for path in ("/docs", "/docs/reference.js", "/openapi.json", "/docs/nothing"):
        asked = await api.get(path)
        assert asked.headers["www-authenticate"] == 'Basic realm="serve_app", charset="UTF-8"'
        for credentials in (_basic(KEY), _basic("", KEY)):
            shown = await api.get(path, headers={"authorization": f"Basic {credentials}"})
            assert shown.status_code == (404 if path.endswith("nothing") else 200)
        for wrong in (_basic("sa-wrong"), "!", base64.b64encode(b"\xff").decode(), ""):
            assert (await api.get(path, headers={"authorization": f"Basic {wrong}"})).status_code == 401
    # A browser sends the password by itself, so it does nothing but show pages.
    for method, path in (("GET", "/v1/models"), ("GET", "/stream?prompt=Hi"), ("POST", CHAT), ("POST", "/docs")):
        answer = await api.request(method, path, headers={"authorization": f"Basic {_basic(KEY)}"})
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, 'Bearer realm="serve_app"')


async def test_pages_of_other_sites_are_refused_before_a_key_is_looked_at(api: httpx.AsyncClient) -> None:
    answer = await api.get("/docs", headers={"origin": "http://evil.example", "authorization": f"Basic {_basic(KEY)}"})
    assert answer.json()["error"]["code"] == "origin_not_allowed"


async def test_allowed_pages_can_ask_and_read_the_refusal(
    replica: FakeReplica, make_app: MakeApp, http: Http, guard: Guard
) -> None:
    api = http(make_app(replica, guard=guard, cors_origins=("http://localhost:3000",)))
    page = {"origin": "http://localhost:3000"}
    preflight = {**page, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    asked = await api.options(CHAT, headers=preflight)
    assert (asked.status_code, asked.headers["access-control-allow-headers"]) == (200, "authorization")
    refused = await api.post(CHAT, json=HI, headers=page)
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, page["origin"])


async def test_the_body_of_a_stranger_is_not_read(app: Starlette) -> None:
    exchange = Exchange(app, "POST", CHAT, b"{", {"content-length": "1000000"})
    await exchange.end()
    assert exchange.status == 401
    assert exchange._incoming.qsize() == 1


async def test_a_revoked_key_and_an_expired_one_are_refused(
    api: httpx.AsyncClient, guard: Guard, keys_file: Path
) -> None:
    assert (await api.get("/v1/models", headers=bearer())).status_code == 200
    write_keys(keys_file)
    guard.keys.refresh()
    assert "revoked" in (await api.get("/v1/models", headers=bearer())).json()["error"]["message"]
    write_keys(keys_file, entry("alice", KEY, expires=datetime(2020, 1, 1, tzinfo=UTC)))
    guard.keys.refresh()
    assert "expired" in (await api.get("/v1/models", headers=bearer())).json()["error"]["message"]


async def test_guessing_is_slowed_and_its_neighbours_are_not(app: Starlette) -> None:
    async def ask(address: str, key: str) -> Exchange:
        exchange = Exchange(app, "GET", "/v1/models", headers=bearer(key))
        exchange._scope["client"] = (address, 1)
        await exchange.end()
        return exchange

    assert (await ask("203.0.113.7", KEY)).status == 200
    statuses = [(await ask("203.0.113.7", f"sa-{number}")).status for number in range(WRONG_KEYS + 2)]
    assert statuses == [401] * WRONG_KEYS + [429] * 2
    refused = await ask("203.0.113.7", "sa-more")
    headers = dict(refused.sent[0]["headers"])
    assert 1 <= int(headers[b"retry-after"]) <= 6
    assert b"too_many_wrong_keys" in refused.body
    assert (await ask("203.0.113.7", KEY)).status == 200, "known there"
    assert (await ask("203.0.113.8", "sa-1")).status == 401, "another address"


async def test_a_caller_stands_in_log_and_metrics_by_name(
    replica: FakeReplica, make_app: MakeApp, http: Http, tmp_path: Path, metrics: MemoryMetrics, caplog: Any
) -> None:
    guard = guard_of(tmp_path / "keys.yaml", entry("alice", KEY, tenant="research"))
    api = http(make_app(replica, guard=guard))
    with caplog.at_level(logging.DEBUG):
        await api.post("/stream", json=HI, headers=bearer())
        await api.post("/stream", json=HI, headers=bearer("sa-wrong"))
    lines = [record.getMessage() for record in caplog.records if record.name == "serve_app.access"]
    named = [line.rpartition(" key=")[2].partition(" ignored")[0] for line in lines]
    assert named == ["alice tenant=research", "- tenant=-"]
    assert not any(secret in caplog.text for secret in (KEY, "sa-wrong"))
    assert metrics.counters[m.KEY_REQUESTS.name, ("research", "alice", "stop")] == 1
    assert metrics.counters[m.KEY_TOKENS.name, ("research", "alice", "output")] > 3
    assert metrics.counters[m.KEY_TOKENS.name, ("research", "alice", "prompt")] > 3
    assert len([key for key in metrics.counters if key[0] == m.KEY_REQUESTS.name]) == 1


async def test_the_launchers_secret_opens_ready_and_nothing_else(api: httpx.AsyncClient) -> None:
    assert (await api.get("/ready", headers=bearer("probe"))).status_code == 200
    assert (await api.get("/v1/models", headers=bearer("probe"))).status_code == 401


async def test_ready_tells_an_admin_how_the_keys_are(
    replica: FakeReplica, make_app: MakeApp, http: Http, keys_file: Path
) -> None:
    other = new_key()
    guard = guard_of(keys_file, entry("alice", KEY, admin=True), entry("bob", other))
    api = http(make_app(replica, guard=guard))
    write_keys(keys_file, {"name": "alice"})
    guard.keys.refresh()
    of_admin = (await api.get("/ready", headers=bearer())).json()["access"]
    assert (of_admin["keys"], "sha256" in of_admin["keys_fault"]) == (2, True)
    assert (await api.get("/ready", headers=bearer(other))).json()["access"] == {"keys_required": True}


async def test_only_an_admin_reads_the_metrics(
    replica: FakeReplica, make_app: MakeApp, http: Http, keys_file: Path
) -> None:
    """They name all tenants and what each uses."""
    other = new_key()
    guard = guard_of(keys_file, entry("alice", KEY, admin=True), entry("bob", other))
    api = http(make_app(replica, guard=guard))
    assert (await api.get("/metrics", headers=bearer())).status_code == 200
    refused = await api.get("/metrics", headers=bearer(other))
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "admin_only")
    assert "--admin" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("bound_to", "variable", "warns"),
    [
        ("0.0.0.0", "", True),
        ("192.0.2.1", "", True),
        ("::", "", True),
        ("127.0.0.1", "", False),
        ("localhost", "", False),
        (None, "", False),
        ("0.0.0.0", KEY, False),
    ],
)
async def test_a_service_for_everybody_says_so(
    replica: FakeReplica, make_app: MakeApp, http: Http, bound_to: str | None, variable: str, warns: bool
) -> None:
    guard = Guard(ApiKeys(environment={VARIABLE: variable}), bound_to=bound_to)
    assert bool(guard.warning) is warns
    ready = await http(make_app(replica, guard=guard)).get("/ready", headers=bearer())
    assert ready.json()["access"].get("warning", "") == guard.warning
