"""Serve's own HTTP server, as it starts it, with our middlewares: what clients get when no application answers."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
import uvicorn
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http import auto, h11_impl, httptools_impl

from serve_app.cli.environment import SERVER_ENVIRONMENT
from serve_app.deployments import serve_http
from serve_app.deployments.serve_http import JsonErrors, middlewares

VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"


def answering(response: Response) -> httpx.AsyncClient:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await response(scope, receive, send)

    return httpx.AsyncClient(transport=httpx.ASGITransport(JsonErrors(app)), base_url="http://test")


@pytest.mark.parametrize(
    ("status", "given", "code", "retry_after"),
    [
        (404, {}, "not_found", None),
        (408, {}, "deadline_exceeded", None),
        (429, {}, "overloaded", "1"),
        (503, {}, "overloaded", "1"),
        (503, {"retry-after": "7"}, "overloaded", "7"),
        (500, {}, "internal_error", None),
    ],
)
async def test_serves_text_becomes_the_apis_error(
    status: int, given: dict[str, str], code: str, retry_after: str | None
) -> None:
    text = PlainTextResponse("ray.exceptions.Secret: /home/me", status, headers={"x-request-id": "abc", **given})
    async with answering(text) as client:
        response = await client.post("/stream")
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert "Secret" not in response.text
    assert response.headers.get("retry-after") == retry_after
    assert response.headers["x-request-id"] == "abc"


@pytest.mark.parametrize("prefix", ["", "/llm", "/v1/llm"])
async def test_serves_text_becomes_the_error_that_the_client_reads(prefix: str) -> None:
    async with answering(PlainTextResponse("Too many.", 503, headers={"x-request-id": "abc"})) as client:
        response = await client.post(f"{prefix}/v1/messages")
    assert response.json()["error"]["type"] == "overloaded_error"
    assert response.json()["request_id"] == response.headers["request-id"] == "abc"


@pytest.mark.parametrize("response", [JSONResponse({"error": {}}, 503), PlainTextResponse("metrics", 200)])
async def test_what_the_application_says_passes(response: Response) -> None:
    async with answering(response) as client:
        assert (await client.get("/x")).content == response.body


async def test_what_serve_tells_machines_passes() -> None:
    async with answering(PlainTextResponse("DRAINING", 503)) as client:
        assert (await client.get("/-/healthz")).text == "DRAINING"


@asynccontextmanager
async def served(app: ASGIApp, protocol: type, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[int]:
    """uvicorn with the protocol that Serve's servers get once Serve has called `middlewares`; its port."""
    monkeypatch.setattr(auto, "AutoHTTPProtocol", protocol)
    for _ in range(2):  # a proxy and a replica in one process are none, but nothing forbids it
        middlewares()
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="off"))
    running = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110 - uvicorn offers no event
        await asyncio.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = server.force_exit = True
    await running


async def exchange(port: int, request: bytes) -> tuple[bytes, bytes]:
    """Head and body of what comes until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    async with asyncio.timeout(60):
        received = await reader.read()
    writer.close()
    head, _, body = received.partition(b"\r\n\r\n")
    return head, body


@pytest.mark.parametrize("protocol", [httptools_impl.HttpToolsProtocol, h11_impl.H11Protocol])
async def test_what_can_not_be_read_or_never_comes(protocol: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_http, "HEADER_TIMEOUT_S", 0.3)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/slow":
            await asyncio.sleep(0.6)  # an answer may take longer than headers may
        await JSONResponse({"port": scope["client"][1]})(scope, receive, send)

    async with served(app, protocol, monkeypatch) as port:
        head, body = await exchange(port, b"nonsense\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert b'"invalid_http"' in body
        for never in (b"", b"POST /stream HTTP/1.1\r\nHost: localh"):
            head, body = await exchange(port, never)
            assert head.startswith(b"HTTP/1.1 408 ")
            assert b"content-type: application/json" in head
            assert b'"request_timeout"' in body
        async with httpx.AsyncClient(timeout=60) as client:
            first = (await client.get(f"http://127.0.0.1:{port}/")).json()
            await asyncio.sleep(0.4)  # longer than the limit for headers
            slow = (await client.get(f"http://127.0.0.1:{port}/slow")).json()
            assert slow == first, "an idle connection that has had a request is kept"


def test_serve_takes_it_from_the_environment_that_we_give() -> None:
    """In a process of its own: a Ray that reads another variable, or wants another kind of list, is noticed here."""
    code = (
        "from ray.serve._private.http_util import configure_http_middlewares\n"
        "from ray.serve.config import HTTPOptions\n"
        "print([m.cls.__name__ for m in configure_http_middlewares(HTTPOptions()).middlewares])"
    )
    environment = {**os.environ, VARIABLE: SERVER_ENVIRONMENT[VARIABLE]}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "['JsonErrors']"
