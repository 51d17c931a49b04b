"""gRPC through Serve's own proxy, in front of the fake model server: answers, errors, ends, and a killed replica."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import ray
from fake_model_server import FakeModelServer, expected_tokens
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from ray import serve

from serve_app.api.grpc.services import CHECK, HEALTH_SERVICE, JINA_SERVICE, SERVICE, STREAM, STREAM_DOC
from serve_app.client import AsyncClient
from serve_app.config import AppConfig
from serve_app.deployments.ingress import Ingress
from serve_app.proto.jina_pb2 import DocProto, HeaderProto, NodeProto, SingleDocumentRequestProto
from serve_app.proto.serve_app_pb2 import Message, ModelOutputDocument, PromptDocument

pytestmark = pytest.mark.ray

APP = "grpc"
APPLICATION = ("application", APP)
RESUMABLE = ("x-stream-resume", "1")
TOKEN_S = 0.02
LONG = 400
"""Tokens of an answer that takes 8 s, undisturbed."""


def prompt(max_tokens: int = 5, text: str = "Hi") -> PromptDocument:
    return PromptDocument(messages=[Message(role="user", content=text)], max_tokens=max_tokens, seed=7)


class Service:
    """The application, and a channel to Serve's proxy."""

    def __init__(self, channel: grpc.aio.Channel, target: str) -> None:
        self.channel = channel
        self.target = target
        self.handle = serve.get_deployment_handle("ModelServer", APP)

    def stream(self, request: PromptDocument | bytes, *metadata: tuple[str, str], timeout: float = 60) -> Any:
        call = self.channel.unary_stream(STREAM, response_deserializer=ModelOutputDocument.FromString)
        content = request if isinstance(request, bytes) else request.SerializeToString()
        return call(content, metadata=(APPLICATION, *metadata), timeout=timeout)

    async def running(self) -> dict[int, int]:
        async with asyncio.timeout(20):
            while True:
                try:
                    await self.handle.where.remote()  # a new handle knows no replica yet
                    return dict(await self.handle.broadcast("where").results_async())
                except ray.exceptions.ActorDiedError:  # the handle still knows a replica that was killed
                    await asyncio.sleep(0.05)

    async def until_idle(self) -> None:
        async with asyncio.timeout(20):
            while any((await self.running()).values()):  # noqa: ASYNC110 - in other processes
                await asyncio.sleep(0.05)


@pytest.fixture(scope="module")
def target(cluster: Any, deployed: Callable[..., str], until: Callable[..., httpx.Response], text_folder: Path) -> str:
    ending = {"graceful_shutdown_timeout_s": 1, "graceful_shutdown_wait_loop_s": 0.1}
    options = {"ray_actor_options": {"num_cpus": 0.1}} | ending
    config = AppConfig.model_validate({"model": {"source": str(text_folder)}, "api": {"max_body_bytes": 10_000}})
    fake = serve.deployment(name="ModelServer", max_ongoing_requests=16, num_replicas=2, **options)(FakeModelServer)
    ingress = serve.deployment(name="Ingress", max_ongoing_requests=64, **options)(Ingress)
    url = deployed(ingress.bind(config, fake.bind(config, TOKEN_S)), APP)
    until(f"{url}/ready", lambda response: response.status_code == 200)
    return str(cluster.grpc)


@pytest.fixture
async def service(target: str) -> AsyncIterator[Service]:
    async with grpc.aio.insecure_channel(target) as channel:
        yield Service(channel, target)


def ids(messages: list[ModelOutputDocument]) -> list[int]:
    return [message.token_id for message in messages if message.HasField("token_id")]


async def test_an_answer_and_its_metadata(service: Service) -> None:
    call = service.stream(prompt(), ("x-request-id", "r1"))
    messages = [message async for message in call]
    assert ids(messages) == expected_tokens(7, 5)
    assert (messages[-1].done.finish_reason, messages[-1].done.usage.completion_tokens) == ("length", 5)
    trailing = dict(await call.trailing_metadata())
    assert (trailing["x-request-id"], trailing["x-seed"]) == ("r1", "7")


@pytest.mark.parametrize(
    ("request_", "code", "error"),
    [
        (prompt(0), grpc.StatusCode.INVALID_ARGUMENT, "invalid_value"),
        (prompt(5, "Hi " * 2000), grpc.StatusCode.INVALID_ARGUMENT, "context_length_exceeded"),
        (prompt(5, "x" * 10_000), grpc.StatusCode.RESOURCE_EXHAUSTED, "body_too_large"),
        (b"\x0a\xff", grpc.StatusCode.INVALID_ARGUMENT, "invalid_protobuf"),
    ],
)
async def test_errors_are_status_codes(service: Service, request_: Any, code: grpc.StatusCode, error: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        [_ async for _ in service.stream(request_, ("x-request-id", "r2"))]
    details = json.loads(refused.value.details() or "")
    assert (refused.value.code(), details["error"]["code"], details["request_id"]) == (code, error, "r2")
    assert "Traceback" not in (refused.value.details() or "")


async def test_cancelling_stops_the_work(service: Service) -> None:
    await service.until_idle()
    call = service.stream(prompt(LONG))
    await anext(aiter(call))
    assert sum((await service.running()).values()) == 1
    call.cancel()
    await service.until_idle()


async def test_a_deadline_stops_the_work(service: Service) -> None:
    await service.until_idle()
    with pytest.raises(grpc.aio.AioRpcError) as late:
        [_ async for _ in service.stream(prompt(LONG), timeout=1)]
    assert late.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    await service.until_idle()


async def kill_where_it_runs(service: Service) -> None:
    running = await service.running()
    os.kill(max(running, key=lambda pid: running[pid]), signal.SIGKILL)


async def test_a_killed_replica_changes_nothing(service: Service) -> None:
    await service.until_idle()
    call = service.stream(prompt(100))
    messages = aiter(call)
    seen = [await anext(messages) for _ in range(5)]
    await kill_where_it_runs(service)
    seen += [message async for message in messages]
    assert seen[-1].done.usage.completion_tokens == 100
    # The last token is no whole character: what is shown in its place comes with its id once more.
    assert ids(seen) == [*(tokens := expected_tokens(7, 100)), tokens[-1]]


async def test_a_lost_connection_and_a_killed_replica(service: Service) -> None:
    await two_replicas(service)
    undisturbed = [message async for message in service.stream(prompt(100), RESUMABLE) if carries(message)]
    call = service.stream(prompt(100), RESUMABLE)
    messages = aiter(call)
    opening = await anext(messages)
    assert not carries(opening)
    seen = [await anext(messages) for _ in range(5)]
    call.cancel()
    await kill_where_it_runs(service)

    def rest_after(message: ModelOutputDocument) -> Any:
        return service.stream(PromptDocument(), RESUMABLE, ("last-event-id", message.event_id))

    seen += [message async for message in rest_after(seen[-1]) if carries(message)]
    assert [content_of(message) for message in seen] == [content_of(message) for message in undisturbed]
    assert ids(seen)[:100] == expected_tokens(7, 100)
    assert [message async for message in rest_after(opening) if carries(message)] == seen
    assert [message async for message in rest_after(seen[-1])] == []


def carries(message: ModelOutputDocument) -> bool:
    """Whether it has a token or the end, and not only the id of an event."""
    return bool(message.HasField("token_id") or message.HasField("done"))


def content_of(message: ModelOutputDocument) -> tuple[int, str, str, str]:
    """All but the stream's id."""
    return message.token_id, message.generated_text, str(message.done), message.event_id.partition(":")[2]


async def two_replicas(service: Service) -> None:
    async with asyncio.timeout(120):
        while True:
            state = (await asyncio.to_thread(serve.status)).applications[APP].deployments["ModelServer"].replica_states
            if state == {"RUNNING": 2}:
                return
            await asyncio.sleep(0.1)


async def test_the_python_client(service: Service) -> None:
    headers = {"application": APP}
    async with AsyncClient(f"grpc://{service.target}", headers=headers) as client:
        assert (await client.ready()).ready
        answer = await client.complete(prompt="Hi", max_tokens=6, seed=7, resume=True)
    assert list(answer.token_ids) == expected_tokens(7, 6)


async def test_jinas_call(service: Service) -> None:
    data = {
        "id": NodeProto(text="d1", type="id"),
        "prompt": NodeProto(text="Hi"),
        "max_tokens": NodeProto(integer=3),
        "seed": NodeProto(integer=7),
    }
    request = SingleDocumentRequestProto(
        header=HeaderProto(request_id="j1", exec_endpoint="/stream"), document=DocProto(data=data)
    )
    call = service.channel.unary_stream(
        STREAM_DOC,
        request_serializer=SingleDocumentRequestProto.SerializeToString,
        response_deserializer=SingleDocumentRequestProto.FromString,
    )
    answers = [answer async for answer in call(request, metadata=(APPLICATION,))]
    assert [answer.document.data["token_id"].integer for answer in answers] == expected_tokens(7, 3)
    assert {answer.header.request_id for answer in answers} == {"j1"}


async def test_health_and_reflection(service: Service) -> None:
    check = service.channel.unary_unary(
        CHECK,
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    for name in ("", SERVICE, JINA_SERVICE):
        answer = await check(health_pb2.HealthCheckRequest(service=name), metadata=(APPLICATION,))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.aio.AioRpcError) as unknown:
        await check(health_pb2.HealthCheckRequest(service="else"), metadata=(APPLICATION,))
    assert unknown.value.code() == grpc.StatusCode.NOT_FOUND
    stub = reflection_pb2_grpc.ServerReflectionStub(service.channel)
    asked = [reflection_pb2.ServerReflectionRequest(list_services="")]
    answers = [answer async for answer in stub.ServerReflectionInfo(iter(asked))]
    names = {each.name for answer in answers for each in answer.list_services_response.service}
    assert {SERVICE, JINA_SERVICE, HEALTH_SERVICE} <= names


async def test_callers_of_other_machines_are_refused(service: Service) -> None:
    """Serve listens on all addresses here. A caller that uses the machine's own address looks like another machine."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("198.51.100.1", 9))  # sends nothing
        except OSError:
            pytest.skip("this machine has only its loopback address")
        address = probe.getsockname()[0]
    port = service.target.rpartition(":")[2]
    async with grpc.aio.insecure_channel(f"{address}:{port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            [_ async for _ in Service(channel, "").stream(prompt())]
        with pytest.raises(grpc.aio.AioRpcError) as unhealthy:
            await channel.unary_unary(CHECK)(b"", metadata=(APPLICATION,))
    assert {refused.value.code(), unhealthy.value.code()} == {grpc.StatusCode.PERMISSION_DENIED}
    assert json.loads(refused.value.details() or "")["error"]["code"] == "host_not_allowed"
