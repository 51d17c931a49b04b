"""The model server's health over a real engine: dead and hung are ill, busy is not."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest
import ray
import torch
from memory_metrics import MemoryMetrics
from tiny_models import FINGERPRINT, request_for, tiny_model, until

from serve_app.config import EngineConfig
from serve_app.core import SamplingParams
from serve_app.deployments import model_server
from serve_app.deployments.dispatch.channel_writer import TokenChannels
from serve_app.deployments.dispatch.liveness import IngressLiveness
from serve_app.deployments.model_server import ModelServer
from serve_app.engine import build
from serve_app.engine.attention.base import AttentionParams, Span
from serve_app.engine.attention.sdpa import SdpaAttention
from serve_app.engine.engine import Engine
from serve_app.observability.metrics import ACCEPTED_TOKENS, DRAFTED_TOKENS


class Gated(SdpaAttention):
    """Waits for leave in each layer; breaks where it is told to."""

    leave = threading.Event()
    broken = False

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, params: AttentionParams, step: list[Span]
    ) -> torch.Tensor:
        assert Gated.leave.wait(60), "nobody has opened the gate"
        if Gated.broken:
            raise RuntimeError("the device is gone")
        return super().attend(query, keys, values, params, step)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelServer]:
    """A replica without Ray around it: only its engine."""
    monkeypatch.setattr(Gated, "broken", False)
    Gated.leave.set()
    made = object.__new__(ModelServer)
    made._ingresses = IngressLiveness()
    made._channels = TokenChannels()
    monkeypatch.setattr(build, "_candidates", lambda config, kernels: (Gated,))
    made._engine = Engine(
        tiny_model("llama"),
        EngineConfig(kv_cache_memory=2**24, threads=1),
        context_tokens=256,
        fingerprint=FINGERPRINT,
    )
    yield made
    Gated.leave.set()
    made._engine.stop()


async def test_a_busy_engine_is_healthy_and_a_hung_one_is_not(
    server: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    await server.check_health()
    Gated.leave.clear()
    stream = server.generate(request_for([1] * 200, 3))
    first = asyncio.create_task(anext(stream))
    await until(lambda: server._engine.health().step_running_s > 0)
    await server.check_health()
    monkeypatch.setattr(model_server, "STALL_LIMIT_S", 0.0)
    with pytest.raises(RuntimeError, match="an engine step has been running"):
        await server.check_health()
    Gated.leave.set()
    await first
    await stream.aclose()


async def test_a_dead_engine_is_ill_and_says_of_what(server: ModelServer, monkeypatch: pytest.MonkeyPatch) -> None:
    Gated.leave.clear()
    stream = server.generate(request_for([1, 2, 3], 50))
    first = asyncio.create_task(anext(stream))
    await until(lambda: server._engine.health().step_running_s > 0)
    monkeypatch.setattr(Gated, "broken", True)
    Gated.leave.set()
    await first
    async for _ in stream:
        pass
    await until(lambda: not server._engine.health().alive)
    with pytest.raises(RuntimeError, match="the device is gone"):
        await server.check_health()


async def test_guessed_tokens_are_counted_once(server: ModelServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_server, "METRICS_PERIOD_S", 0.0)
    metrics = MemoryMetrics()
    reports = asyncio.create_task(server._report_metrics(metrics))
    sampling = SamplingParams(seed=0, temperature=0, logit_bias=((9, 50.0),))
    async for _ in server._engine.generate(request_for([1, 2, 3], 60, sampling=sampling)):
        pass
    counters = server._engine.stats().counters
    assert counters.accepted_tokens > 0
    for metric, count in ((DRAFTED_TOKENS, counters.drafted_tokens), (ACCEPTED_TOKENS, counters.accepted_tokens)):
        await until(lambda metric=metric, count=count: metrics.counters[metric.name, ()] == count)  # type: ignore[misc]
    reports.cancel()


@pytest.mark.parametrize(
    ("alive", "environment", "host"),
    [
        ((True,), {}, "127.0.0.1"),
        ((True, False), {"RAY_USE_TLS": "0"}, "127.0.0.1"),
        ((True, True), {}, "198.51.100.7"),
        ((True, True), {"RAY_USE_TLS": "1"}, None),
    ],
)
def test_token_channels_are_had_where_ingress_replicas_can_be(
    monkeypatch: pytest.MonkeyPatch, alive: tuple[bool, ...], environment: dict[str, str], host: str | None
) -> None:
    monkeypatch.delenv("RAY_USE_TLS", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": each} for each in alive])
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "198.51.100.7")
    assert model_server._channel_host() == host
