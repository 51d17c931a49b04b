from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import httpx
import pytest
from asgi_driver import Exchange
from fake_replica import FakeReplica
from starlette.applications import Starlette

from serve_app.api.errors import ApiError
from serve_app.api.http import body as body_module

HI = b'{"prompt": "Hi"}'


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"   ", "empty"),
        (b"hello", "not valid JSON"),
        (b'{"prompt": "Hi"', "not valid JSON"),
        (b'{"prompt": "Hi"} x', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a":' * 40_000, "not valid JSON"),
        (b'{"prompt": "\xff"}', "not valid UTF-8 (byte 12)"),
        (b"\x1f\x8b\x08\x00", "not valid UTF-8"),
        ('{"prompt": "Hi"}'.encode("utf-16"), "UTF-16 or UTF-32; send JSON as UTF-8"),
        ('{"prompt": "Hi"}'.encode("utf-16-be"), "UTF-16 or UTF-32"),
        ('{"prompt": "Hi"}'.encode("utf-16-le"), "UTF-16 or UTF-32"),
        ('{"prompt": "Hi"}'.encode("utf-32"), "UTF-16 or UTF-32"),
        (b"\xef\xbb\xbf", "empty"),
        (b"\xef\xbb\xbf\xef\xbb\xbf" + HI, "not valid JSON"),
        (b'{"prompt": "\\ud800"}', "not valid JSON"),
        (b'{"prompt": "Hi", "temperature": NaN}', "not valid JSON"),
        (b'{"prompt": "Hi", "temperature": -Infinity}', "not valid JSON"),
        (b'{"prompt": "Hi", "temperature": 1e999}', "temperature"),
        (b'{"prompt": "Hi", "seed": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'["prompt"]', "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'"prompt"', "must be a JSON object"),
        (b'{"' + b"k" * 5000 + b'": 1, "prompt": "Hi"}', "Unknown parameter"),
    ],
)
async def test_bytes_that_are_no_request(
    api: httpx.AsyncClient, replica: FakeReplica, content: bytes, says: str
) -> None:
    response = await api.post("/stream", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400
    error = response.json()["error"]
    assert says in error["message"]
    assert len(response.content) < 500
    assert replica.requests == []


@pytest.mark.parametrize("content_type", ["application/json", "text/plain", "application/x-www-form-urlencoded", ""])
async def test_json_is_taken_whatever_it_is_called(api: httpx.AsyncClient, content_type: str) -> None:
    response = await api.post("/stream", content=HI, headers={"content-type": content_type})
    assert response.status_code == 200


@pytest.mark.parametrize("form", [{"data": {"prompt": "Hi"}}, {"files": {"prompt": b"Hi"}}])
async def test_a_form_is_refused_with_what_to_do(api: httpx.AsyncClient, form: dict[str, dict[str, str]]) -> None:
    response = await api.post("/stream", **form)  # type: ignore[arg-type]
    assert response.status_code == 415
    assert "application/json" in response.json()["error"]["message"]


async def test_compressed_bodies_are_refused(api: httpx.AsyncClient) -> None:
    response = await api.post("/stream", content=HI, headers={"content-encoding": "gzip"})
    assert response.status_code == 415


async def test_a_large_body_is_refused_by_its_length_unread(replica: FakeReplica, make_app: object) -> None:
    app: Starlette = make_app(replica, max_body_bytes=100)  # type: ignore[operator]
    exchange = Exchange(app, "POST", "/stream", headers={"content-length": str(100 * 2**20)})
    exchange._incoming.get_nowait()
    await exchange.end()
    assert exchange.status == 413
    assert b'"body_too_large"' in exchange.body


async def test_a_large_body_without_a_length_is_refused_where_it_exceeds(
    replica: FakeReplica, make_app: object, http: object
) -> None:
    client: httpx.AsyncClient = http(make_app(replica, max_body_bytes=100))  # type: ignore[operator]
    given = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal given
        while True:
            given += 50
            yield b" " * 50

    response = await client.post("/stream", content=endless())
    assert response.status_code == 413
    assert given <= 200


async def test_a_body_that_never_ends_is_given_up(
    replica: FakeReplica, make_app: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body_module, "BODY_TIMEOUT_S", 0.02)
    exchange = Exchange(make_app(replica), "POST", "/stream")  # type: ignore[operator]
    exchange._incoming.get_nowait()
    exchange._incoming.put_nowait({"type": "http.request", "body": b"{", "more_body": True})
    await exchange.end()
    assert exchange.status == 408


async def test_a_client_that_goes_while_it_sends(replica: FakeReplica, make_app: object) -> None:
    exchange = Exchange(make_app(replica), "POST", "/stream")  # type: ignore[operator]
    exchange._incoming.get_nowait()
    exchange._incoming.put_nowait({"type": "http.request", "body": b"{", "more_body": True})
    await asyncio.sleep(0)
    exchange.disconnect()
    await exchange.end()
    assert exchange.sent == []


async def test_a_byte_order_mark_changes_nothing(api: httpx.AsyncClient, replica: FakeReplica) -> None:
    for content in (HI, b"\xef\xbb\xbf" + HI, b"\xef\xbb\xbf \r\n" + HI):
        assert (await api.post("/stream", content=content)).status_code == 200
    assert len({request.prompt_token_ids for request in replica.requests}) == 1


FULL = body_module.MAX_JSON_PARTS


@pytest.mark.parametrize(
    ("content", "is_taken"),
    [
        # the body itself, its key and the list are parts too
        (b'{"prompt": [' + b",".join([b"[]"] * (FULL - 2)) + b"]}", False),
        (b'{"prompt": [' + b",".join([b"{}"] * (FULL - 2)) + b"]}", False),
        (b'{"prompt": [' + b",".join([b'""'] * (FULL - 2)) + b"]}", False),
        (b'{"prompt": [' + b",".join([b'{"a":0}'] * (FULL // 2)) + b"]}", False),
        (b'{"prompt": [' + b",".join([b'"\\\\"'] * (FULL - 2)) + b"]}", False),
        (b'{"prompt": "\\"", "stop": [' + b",".join([b"[]"] * FULL) + b"]}", False),
        # text is no part, whatever is in it
        (b'{"prompt": "' + b"{[" * FULL + b'"}', True),
        (b'{"prompt": "' + b'\\"' * 3 * FULL + b'"}', True),
        (b'{"prompt": "' + b"\\\\" * FULL + b"[{" * FULL + b'\\\\\\""}', True),
        (b'{"prompt": "' + b'[\\"' * FULL + b'", "stop": ["' + b"{" * 900 + b'"]}', True),
        (b'{"stop": ["' + b"[" * FULL + b'"], "prompt": ""' + b" " * FULL + b"}", True),
    ],
)
def test_no_body_has_many_objects_lists_and_strings(content: bytes, is_taken: bool) -> None:
    """They would be made in the event loop, all at once."""
    if is_taken:
        assert body_module._decode(content, "") == json.loads(content)
    else:
        with pytest.raises(ApiError, match="more than 100000 objects, lists and strings") as refused:
            body_module._decode(content, "")
        assert refused.value.status == 400
