"""Which class a request gets: by its fields in every format, and by the caller's key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_keys import KEY, bearer, entry, guard_of
from fake_replica import FakeReplica
from starlette.applications import Starlette

from serve_app.core import Priority

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
REQUESTS: dict[str, dict[str, Any]] = {
    "/stream": {"prompt": "Hi"},
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"prompt": "Hi"},
    "/v1/messages": {**CHAT, "max_tokens": 20},
    "/v1/responses": {"input": "Hi", "store": False},
}
INTERACTIVE, BATCH = Priority.INTERACTIVE, Priority.BATCH


@pytest.mark.parametrize("url", REQUESTS)
async def test_every_format_takes_the_same_fields(url: str, api: httpx.AsyncClient, replica: FakeReplica) -> None:
    asked: list[tuple[dict[str, Any], Priority]] = [
        ({}, INTERACTIVE),
        ({"priority": None, "service_tier": None}, INTERACTIVE),
        ({"priority": "interactive"}, INTERACTIVE),
        ({"priority": 0, "service_tier": "auto"}, INTERACTIVE),
        ({"priority": "batch"}, BATCH),
        ({"priority": 7}, BATCH),
        ({"service_tier": "flex"}, BATCH),
        ({"service_tier": "flex", "priority": "interactive"}, INTERACTIVE),
    ]
    for fields, expected in asked:
        response = await api.post(url, json={**REQUESTS[url], **fields})
        assert response.status_code == 200, response.text
        assert replica.requests[-1].priority is expected, fields
        assert "x-ignored-fields" not in response.headers
    for wrong in (-1, "urgent", True, 1.5, ["batch"]):
        response = await api.post(url, json={**REQUESTS[url], "priority": wrong})
        assert response.status_code == 400, wrong
        assert "priority" in response.text
    assert len(replica.requests) == len(asked)


@pytest.mark.parametrize(
    ("value", "expected"), [("batch", BATCH), ("1", BATCH), ("0", INTERACTIVE), ("-1", None), ("", None)]
)
async def test_a_query_has_it_as_text(
    value: str, expected: Priority | None, api: httpx.AsyncClient, replica: FakeReplica
) -> None:
    response = await api.get("/stream", params={"prompt": "Hi", "priority": value})
    assert response.status_code == (400 if expected is None else 200)
    assert [request.priority for request in replica.requests] == ([] if expected is None else [expected])


@pytest.mark.parametrize("url", REQUESTS)
async def test_a_class_that_the_key_does_not_allow_is_refused(
    url: str,
    make_app: Callable[..., Starlette],
    http: Callable[..., httpx.AsyncClient],
    replica: FakeReplica,
    tmp_path: Path,
) -> None:
    api = http(make_app(replica, guard=guard_of(tmp_path / "keys.yaml", entry("nightly", KEY, priorities=["batch"]))))
    api.headers.update(bearer())
    refused = await api.post(url, json=REQUESTS[url])
    assert refused.status_code == 403
    assert "The key 'nightly' does not allow priority 'interactive'; it allows 'batch'." in refused.text
    assert not replica.requests
    assert (await api.post(url, json={**REQUESTS[url], "priority": "batch"})).status_code == 200
