"""gRPC through a real HAProxy, with Serve's configuration as `serve-app serve` rewrites it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest
from grpc_server import grpc_server

from serve_app.api.grpc.refusal import refusal
from serve_app.api.grpc.services import CHECK, STREAM
from serve_app.cli.haproxy import _free_ports, bundled_haproxy
from serve_app.cli.private_folder import private_folder
from serve_app.core import FailureCode, RequestError
from serve_app.proto.serve_app_pb2 import ModelOutputDocument

pytestmark = pytest.mark.skipif(bundled_haproxy() is None, reason="ray[serve] brings no HAProxy here")
from haproxy_runner import running_haproxy  # noqa: E402 - needs HAProxy

REFUSED = RequestError("The server is at its limit of 2 requests: \u201etry\u201c again.", code=FailureCode.OVERLOADED)


class Scripted:
    """In the place of a servicer: two tokens, then what the request says."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()

    async def stream(self, request: bytes, call: Any) -> AsyncGenerator[ModelOutputDocument, None]:
        try:
            if request == b"refuse":
                raise refusal(REFUSED, "r1")
            for index in range(2):
                yield ModelOutputDocument(token_id=index, generated_text=str(index))
            if request == b"fail":
                raise refusal(REFUSED, "r2")
            if request == b"wait":
                await asyncio.get_running_loop().create_future()
        finally:
            self.ended.set()

    async def stream_doc(self, request: bytes, call: Any) -> AsyncGenerator[Any, None]:
        yield ModelOutputDocument()

    async def check(self, request: bytes, call: Any) -> Any:
        return ModelOutputDocument()


@pytest.fixture
async def servicer() -> Scripted:
    return Scripted()


@pytest.fixture
async def channel(servicer: Scripted, tmp_path: Path) -> AsyncIterator[grpc.aio.Channel]:
    port, grpc_port = _free_ports(2)
    async with grpc_server(servicer) as target:  # type: ignore[arg-type]
        behind = int(target.rpartition(":")[2])
        with (
            private_folder(tmp_path / "note") as folder,
            running_haproxy(folder, port, [1], grpc=(grpc_port, behind)) as running,
        ):
            listening = [each.laddr for each in psutil.Process(running.process.pid).net_connections("tcp")]
            assert {ip for ip, at in listening if at == grpc_port} == {"127.0.0.1"}
            async with grpc.aio.insecure_channel(f"127.0.0.1:{grpc_port}") as channel:
                await up(channel)
                yield channel


async def up(channel: grpc.aio.Channel) -> None:
    """Until HAProxy has seen that the server is well."""
    async with asyncio.timeout(60):
        while await channel.unary_unary(CHECK)(b"").code() != grpc.StatusCode.OK:  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.05)


async def test_a_stream_arrives_as_it_is_made(channel: grpc.aio.Channel, servicer: Scripted) -> None:
    call = channel.unary_stream(STREAM, response_deserializer=ModelOutputDocument.FromString)(b"wait")
    messages = aiter(call)
    assert [(await anext(messages)).token_id for _ in range(2)] == [0, 1]
    call.cancel()
    await asyncio.wait_for(servicer.ended.wait(), 20)


async def test_a_deadline_ends_the_work(channel: grpc.aio.Channel, servicer: Scripted) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as late:
        [_ async for _ in channel.unary_stream(STREAM)(b"wait", timeout=0.5)]
    assert late.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    await asyncio.wait_for(servicer.ended.wait(), 20)


@pytest.mark.parametrize(("request_", "request_id"), [(b"refuse", "r1"), (b"fail", "r2")])
async def test_an_error_keeps_its_code_and_details(channel: grpc.aio.Channel, request_: bytes, request_id: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        [_ async for _ in channel.unary_stream(STREAM)(request_)]
    details = json.loads(refused.value.details() or "")
    assert (refused.value.code(), details["request_id"]) == (grpc.StatusCode.UNAVAILABLE, request_id)
    assert details["error"]["message"] == REFUSED.message


def test_http_is_not_found_only_once_an_application_is_known(tmp_path: Path) -> None:
    """gRPC's fallback is in HAProxy's configuration before any application is."""
    port, grpc_port, behind = _free_ports(3)
    with (
        private_folder(tmp_path / "note") as folder,
        running_haproxy(folder, port, None, grpc=(grpc_port, behind)),
    ):
        starting = httpx.get(f"http://127.0.0.1:{port}/stream")
    assert (starting.status_code, starting.json()["error"]["code"]) == (503, "not_ready")
