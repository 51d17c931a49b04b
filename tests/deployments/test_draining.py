"""Replicas that go while streams run on them: scaled away, redeployed, with the same weights and with others."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_model_server import FakeModelServer, TwoUntilTold
from ray import serve
from running_streams import Service, Stream, flowing, going_on, moves, until

from serve_app.config import AppConfig
from serve_app.core import FailureCode, Fingerprint
from serve_app.generation.attempt_history import FailoverSettings

pytestmark = pytest.mark.ray

APP = "draining"
TOKEN_S = 0.02
LONG = 30_000
"""Tokens: ten minutes. A test says itself when it has seen enough."""
OTHER = Fingerprint("other")


def application(
    replicas: int | dict[str, Any] = 1, grace_s: float = 30, loaded: Path | None = None, **changes: Any
) -> Any:
    """`replicas`: their number, or a configuration of the autoscaler."""
    number = {"num_replicas": replicas} if isinstance(replicas, int) else {"autoscaling_config": replicas}
    deployment = serve.deployment(FakeModelServer).options(
        name="ModelServer",
        **number,
        max_ongoing_requests=32,
        max_surge_percent=100,
        ray_actor_options={"num_cpus": 0.1},
        graceful_shutdown_timeout_s=grace_s,
        graceful_shutdown_wait_loop_s=0.2,
        request_router_config={"request_router_class": "serve_app.deployments.dispatch.router.ModelRouter"},
    )
    return deployment.bind(AppConfig(), TOKEN_S, loaded, **changes)


def deploy(app: Any, *, wait: bool = True) -> None:
    serve.run_many([serve.RunTarget(app, name=APP, route_prefix=f"/{APP}")], wait_for_applications_running=wait)


@pytest.fixture
def service(deployed: Callable[..., str]) -> Callable[..., Service]:
    def start(*args: Any, **options: Any) -> Service:
        deployed(application(*args, **options), APP)
        return Service(APP)

    return start


def shrinking(told: Path) -> dict[str, Any]:
    """Two replicas until the file `told` is there."""
    policy = {"policy_function": TwoUntilTold, "policy_kwargs": {"told": str(told)}}
    delays = {"upscale_delay_s": 0, "downscale_delay_s": 0, "metrics_interval_s": 0.2, "look_back_period_s": 0.5}
    return {"min_replicas": 1, "initial_replicas": 2, "max_replicas": 2, "policy": policy, **delays}


async def ended(streams: list[Stream], let_end: Callable[[], None]) -> None:
    """Let them end, and see that none has lost a token."""
    let_end()
    await asyncio.gather(*(stream.done for stream in streams))
    for stream in streams:
        assert stream.failure is None
        assert stream.tokens == stream.expected[: len(stream.tokens)]


async def test_streams_leave_a_replica_that_is_scaled_away(
    service: Callable[..., Service], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    fewer, enough = tmp_path / "fewer", tmp_path / "enough"
    running = await asyncio.to_thread(service, shrinking(fewer), enough=enough)
    streams = running.start(8, LONG)
    await flowing(streams)
    async with asyncio.timeout(180):
        while len(before := await running.running()) < 2 or min(before.values()) == 0:  # by chance all are on one
            streams += (another := running.start(1, LONG))
            await flowing(another)
    with caplog.at_level(logging.WARNING, "serve_app.generation.attempts"):
        fewer.touch()
        async with asyncio.timeout(180):
            while len(stays := await running.each("pid")) > 1:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        leaving = sum(streams_there for pid, streams_there in before.items() if pid not in stays)
        assert leaving > 0
        await until(lambda: sum(moves(caplog, streams)) >= leaving)
        await going_on(streams)
        await ended(streams, enough.touch)
    assert sorted(moves(caplog, streams)) == [0] * (len(streams) - leaving) + [1] * leaving
    assert max(stream.longest_pause_s for stream in streams) < FailoverSettings().silence_s, "it did not have to die"


async def test_streams_move_to_the_replica_of_an_update_which_comes_up_first(
    service: Callable[..., Service], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    loaded, enough = tmp_path / "loaded", tmp_path / "enough"
    running = await asyncio.to_thread(service, 1, enough=enough)
    [old] = await running.each("pid")
    streams = running.start(3, LONG)
    await flowing(streams)
    with caplog.at_level(logging.WARNING, "serve_app.generation.attempts"):
        await asyncio.to_thread(deploy, application(1, loaded=loaded, enough=enough), wait=False)
        [short] = Service(APP).start(1, tokens=5)
        await short.done
        assert short.tokens == short.expected  # the old one serves while the new one loads
        assert moves(caplog, streams) == [0] * 3
        loaded.touch()
        await until(lambda: all(moves(caplog, streams)))
        await going_on(streams)
        await ended(streams, enough.touch)
    assert moves(caplog, streams) == [1] * 3
    assert old not in await running.each("pid")


async def test_a_stream_ends_on_its_own_weights_when_others_are_deployed(
    service: Callable[..., Service], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    enough = tmp_path / "enough"
    running = await asyncio.to_thread(service, 1, enough=enough)
    [old] = await running.each("pid")
    streams = running.start(2, LONG)
    await flowing(streams)
    with caplog.at_level(logging.WARNING, "serve_app.generation.attempts"):
        await asyncio.to_thread(deploy, application(1, fingerprint=OTHER, enough=enough), wait=False)
        async with asyncio.timeout(180):
            while old in await running.each("pid"):  # noqa: ASYNC110 - until the other is up
                await asyncio.sleep(0.1)
        await going_on(streams)
        await ended(streams, enough.touch)
    assert moves(caplog, streams) == [0] * 2


async def test_a_stream_whose_weights_are_gone_ends_with_a_clear_error(service: Callable[..., Service]) -> None:
    running = await asyncio.to_thread(service, 1, grace_s=0.5)
    streams = running.start(2, LONG)
    await flowing(streams)
    await asyncio.to_thread(deploy, application(1, grace_s=0.5, fingerprint=OTHER))
    await asyncio.gather(*(stream.done for stream in streams))
    for stream in streams:
        assert stream.failure is not None
        assert stream.failure.code is FailureCode.WRONG_WEIGHTS
        assert stream.tokens == stream.expected[: len(stream.tokens)]
        assert 3 < len(stream.tokens) < LONG
