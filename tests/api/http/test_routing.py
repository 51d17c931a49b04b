"""Each method on each path, known or not."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest
from asgi_driver import Exchange
from fake_replica import FakeReplica
from memory_metrics import MemoryMetrics
from starlette.applications import Starlette

from serve_app.api.http.loading import create_loading_app
from serve_app.api.http.pages import Pages
from serve_app.config import ApiConfig
from serve_app.core import LoadStage

HI = {"messages": [{"role": "user", "content": "Hi"}]}
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PROPFIND", "FOO", "get"]
PATHS = {
    "/stream": {"GET", "POST"},
    "/v1/chat/completions": {"POST"},
    "/v1/completions": {"POST"},
    "/v1/streams/abc": {"GET", "DELETE"},
    "/v1/models": {"GET", "HEAD"},
    "/v1/models/tiny": {"GET", "HEAD"},
    "/health": {"GET", "HEAD"},
    "/ready": {"GET", "HEAD"},
    "/ui/nothing": set(),
    "/nothing/here": set(),
    "/%00": set(),
}
MakeApp = Callable[..., Starlette]


@pytest.fixture
def loading() -> Starlette:
    async def stage() -> LoadStage:
        return LoadStage("loading weights")

    return create_loading_app(stage, MemoryMetrics(), Pages(ApiConfig()))


@pytest.mark.parametrize("slash", ["", "/", "//"])
@pytest.mark.parametrize("path", PATHS)
async def test_json_whatever_is_asked(replica: FakeReplica, make_app: MakeApp, path: str, slash: str) -> None:
    served, app = PATHS[path], make_app(replica)
    for method in METHODS:
        status, headers = await ask(app, method, path + slash)
        assert headers["x-request-id"]
        if method in served:
            assert status in ((200, 400, 404) if "streams" in path else (200, 400)), method
        elif served:
            assert status == (200 if method == "OPTIONS" else 405), method
            assert set(headers["allow"].split(", ")) == {*served, "OPTIONS"}
        else:
            assert status == 404, method
    assert replica.requests == []


@pytest.mark.parametrize("path", PATHS)
async def test_json_while_it_loads(loading: Starlette, path: str) -> None:
    for method in METHODS:
        status, headers = await ask(loading, method, path)
        assert status == (200 if path == "/health" and method in PATHS[path] else 503), method
        assert "retry-after" in headers or status == 200


async def ask(app: Starlette, method: str, path: str) -> tuple[int | None, dict[str, str]]:
    """Status and headers of the answer, which is JSON."""
    exchange = Exchange(app, method, path)
    await exchange.end()
    headers = {name.decode(): value.decode() for name, value in exchange.sent[0]["headers"]}
    assert headers["content-type"] == "application/json", method
    return exchange.status, headers


@pytest.mark.parametrize("path", ["/stream/", "/v1/chat/completions/", "/v1/completions/"])
async def test_a_slash_at_the_end_loses_no_body(api: httpx.AsyncClient, path: str) -> None:
    body = {"prompt": "Hi"} if "chat" not in path else HI
    assert (await api.post(path, json=body)).status_code == 200


async def test_a_slash_at_the_end_below_a_prefix(replica: FakeReplica, make_app: MakeApp) -> None:
    for path, status in (("/app/health/", 200), ("/app/", 200), ("/app", 200), ("/app/x/", 404)):
        exchange = Exchange(make_app(replica), "GET", path)
        exchange._scope["root_path"] = "/app"
        await exchange.end()
        assert exchange.status == status


async def test_a_probe_below_a_prefix_is_not_counted(
    replica: FakeReplica, make_app: MakeApp, metrics: MemoryMetrics
) -> None:
    exchange = Exchange(make_app(replica), "GET", "/app/health")
    exchange._scope["root_path"] = "/app"
    await exchange.end()
    assert metrics.counters == {}


async def test_an_error_repeats_little_of_what_was_asked(api: httpx.AsyncClient) -> None:
    response = await api.request("X" * 5000, "/stream/")
    assert response.status_code == 405
    assert len(response.content) < 500
