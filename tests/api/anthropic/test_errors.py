"""Errors of Anthropic's paths have Anthropic's shape, wherever they are raised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fake_replica import FakeReplica
from memory_metrics import MemoryMetrics
from starlette.applications import Starlette

from serve_app.api.anthropic.errors import error_document
from serve_app.api.errors import ApiError
from serve_app.api.http.loading import create_loading_app
from serve_app.api.http.pages import Pages
from serve_app.config import ApiConfig
from serve_app.core import LoadStage

HI: dict[str, Any] = {"max_tokens": 5, "messages": [{"role": "user", "content": "Hi"}]}
URL = "/v1/messages"
VERSION = {"anthropic-version": "2023-06-01"}


def check(response: httpx.Response, status: int, kind: str) -> dict[str, Any]:
    """The error, which must have the shape."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"type", "error", "request_id"}
    assert (body["type"], body["error"]["type"]) == ("error", kind)
    assert body["request_id"] == response.headers["request-id"] == response.headers["x-request-id"]
    return dict(body["error"])


async def test_a_body_that_is_no_json(api: httpx.AsyncClient) -> None:
    check(await api.post(URL, content=b"{"), 400, "invalid_request_error")
    check(await api.post(f"{URL}/count_tokens", content=b"[]"), 400, "invalid_request_error")


async def test_a_body_that_is_too_large(
    replica: FakeReplica, make_app: Callable[..., Starlette], http: Callable[..., httpx.AsyncClient]
) -> None:
    response = await http(make_app(replica, max_body_bytes=100)).post(URL, json={**HI, "system": "x" * 200})
    check(response, 413, "request_too_large")


async def test_paths_and_methods_that_are_not_served(api: httpx.AsyncClient) -> None:
    check(await api.post(f"{URL}/batches", json=HI), 404, "not_found_error")
    check(await api.get(f"{URL}/batches"), 404, "not_found_error")
    response = await api.get(URL)
    check(response, 405, "invalid_request_error")
    assert "POST" in response.headers["allow"]
    assert (await api.get("/v1/messagesandmore")).json()["error"]["code"] == "not_found"


async def test_another_model_is_not_found(api: httpx.AsyncClient) -> None:
    error = check(await api.post(URL, json={**HI, "model": "claude"}), 404, "not_found_error")
    assert error["details"] == {"error_code": "model_not_found"}
    check(await api.get("/v1/models/claude", headers=VERSION), 404, "not_found_error")
    assert (await api.get("/v1/models/claude")).json()["error"]["code"] == "model_not_found"


async def test_a_page_of_another_site(api: httpx.AsyncClient) -> None:
    response = await api.post(URL, json=HI, headers={"origin": "http://evil.example"})
    check(response, 403, "permission_error")


async def test_pages_that_are_allowed_may_read_the_requests_id(
    replica: FakeReplica, make_app: Callable[..., Starlette], http: Callable[..., httpx.AsyncClient]
) -> None:
    app = make_app(replica, cors_origins=["http://app.example"])
    response = await http(app).post(URL, json=HI, headers={"origin": "http://app.example"})
    assert "request-id" in response.headers["access-control-expose-headers"].split(", ")


async def test_a_defect(api: httpx.AsyncClient, replica: FakeReplica, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken() -> Any:
        raise RuntimeError("secret")

    monkeypatch.setattr(replica, "model", broken)
    error = check(await api.post(URL, json=HI), 500, "api_error")
    assert "secret" not in error["message"]


async def test_an_ingress_that_is_still_loading(http: Callable[..., httpx.AsyncClient]) -> None:
    async def state() -> LoadStage:
        return LoadStage("loading the tokenizer")

    app = create_loading_app(state, MemoryMetrics(), Pages(ApiConfig()))
    response = await http(app).post(URL, json=HI)
    check(response, 503, "overloaded_error")
    assert "retry-after" in response.headers


async def test_other_clients_keep_their_own_shape(api: httpx.AsyncClient) -> None:
    response = await api.post("/v1/chat/completions", content=b"{")
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert "request-id" not in response.headers


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (408, "invalid_request_error"),
        (410, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (503, "overloaded_error"),
        (504, "timeout_error"),
    ],
)
def test_the_type_of_a_status(status: int, kind: str) -> None:
    document = error_document(ApiError(status, "No."), "r1")
    assert document == {"type": "error", "error": {"type": kind, "message": "No."}, "request_id": "r1"}


def test_the_message_names_the_field() -> None:
    for error in (ApiError(400, "It is odd.", param="a.b"), ApiError(400, "a.b: It is odd.", param="a.b")):
        assert error_document(error, "r1")["error"] == {
            "type": "invalid_request_error",
            "message": "a.b: It is odd.",
        }
