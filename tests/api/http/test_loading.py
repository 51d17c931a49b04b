from __future__ import annotations

import httpx
import pytest
from memory_metrics import MemoryMetrics

from serve_app.api.http.loading import create_loading_app
from serve_app.api.http.pages import Pages
from serve_app.config import ApiConfig
from serve_app.core import LoadStage


async def _stage() -> LoadStage:
    return LoadStage("fetching the tokenizer", 0.25)


@pytest.fixture
async def api() -> httpx.AsyncClient:
    app = create_loading_app(_stage, MemoryMetrics(), Pages(ApiConfig()))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


async def test_it_lives_and_says_how_far_it_is(api: httpx.AsyncClient) -> None:
    assert (await api.get("/health")).json() == {"status": "ok"}
    response = await api.get("/ready")
    assert response.status_code == 503
    assert response.json()["fraction"] == 0.25


@pytest.mark.parametrize(("method", "path"), [("POST", "/stream"), ("GET", "/v1/models"), ("DELETE", "/anything")])
async def test_everything_else_is_not_ready_in_the_usual_shape(api: httpx.AsyncClient, method: str, path: str) -> None:
    response = await api.request(method, path, headers={"x-request-id": "abc"})
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "not_ready"
    assert "fetching the tokenizer" in response.json()["error"]["message"]
    assert response.headers["retry-after"] == "5"
    assert response.headers["x-request-id"] == "abc"
