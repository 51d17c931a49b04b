"""`/metrics` of one ingress, with the model and while it loads."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest
from fake_replica import FakeReplica
from memory_metrics import MemoryMetrics
from starlette.applications import Starlette

from serve_app.api.http.loading import create_loading_app
from serve_app.api.http.pages import Pages
from serve_app.config import ApiConfig
from serve_app.core import LoadStage

MakeApp = Callable[..., Starlette]
Http = Callable[[Starlette], httpx.AsyncClient]
TEXT = b"# TYPE serve_app_queued gauge\nserve_app_queued 1.0\n"


async def text() -> bytes:
    return TEXT


async def stage() -> LoadStage:
    return LoadStage("loading weights")


@pytest.fixture(params=["loading", "serving"])
def api(request: pytest.FixtureRequest, replica: FakeReplica, make_app: MakeApp, http: Http) -> httpx.AsyncClient:
    if request.param == "loading":
        return http(create_loading_app(stage, MemoryMetrics(), Pages(ApiConfig()), metrics_text=text))
    return http(make_app(replica, metrics_text=text))


async def test_prometheus_gets_its_format(api: httpx.AsyncClient) -> None:
    answer = await api.get("/metrics")
    assert (answer.status_code, answer.content) == (200, TEXT)
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert (await api.head("/metrics")).status_code == 200


async def test_whoever_scrapes_is_not_counted(
    replica: FakeReplica, make_app: MakeApp, http: Http, metrics: MemoryMetrics
) -> None:
    api = http(make_app(replica, metrics_text=text))
    await api.get("/metrics")
    assert not metrics.counters


async def test_other_methods_are_refused(replica: FakeReplica, make_app: MakeApp, http: Http) -> None:
    answer = await http(make_app(replica, metrics_text=text)).post("/metrics")
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")
