"""How fast a replica works, and what of its load is worth a message."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace
from tiny_models import collect, request_for, until

from serve_app.core import ReplicaLoad
from serve_app.engine.core import EngineCore
from serve_app.engine.engine import Engine
from serve_app.engine.load import RECENT_S, LoadMeter, is_news

LOAD = ReplicaLoad(3, 1, 4, 1024, 80, 100.0, 2.0)


def test_rates_are_0_until_they_are_known_and_no_length_of_a_step_upsets_them() -> None:
    meter = LoadMeter()
    assert (meter.tokens_per_s, meter.seconds_per_request) == (0, 0)
    meter.step(0.0, 5)
    meter.step(-1.0, 5)
    assert meter.tokens_per_s == 0
    meter.step(0.1, 0)
    assert meter.tokens_per_s == pytest.approx(97, abs=1)
    meter.step(1e9, 1)
    assert meter.tokens_per_s == pytest.approx(1e-9)


def test_rates_follow_recent_busy_time() -> None:
    meter = LoadMeter()
    for _ in range(int(5 * RECENT_S / 0.1)):
        meter.step(0.1, 2)
    assert meter.tokens_per_s == pytest.approx(20)
    for _ in range(int(5 * RECENT_S / 0.1)):
        meter.step(0.1, 8)
    assert meter.tokens_per_s == pytest.approx(80, rel=0.02)
    meter.ended(2.0)
    assert meter.seconds_per_request == 2.0
    meter.ended(4.0)
    assert meter.seconds_per_request == 2.25


@pytest.mark.parametrize(
    ("waiting", "seconds_per_request", "expected"), [(256, 0.0, 1.0), (256, 10.0, 10.0), (8, 10.0, 1.0), (0, 10.0, 1.0)]
)
def test_who_is_refused_is_told_when_an_eighth_of_the_queue_will_have_started(
    waiting: int, seconds_per_request: float, expected: float
) -> None:
    core: Any = SimpleNamespace(
        scheduler=SimpleNamespace(line=range(waiting), max_running=32),
        meter=SimpleNamespace(seconds_per_request=seconds_per_request),
    )
    assert EngineCore.retry_after_s(core) == expected


@pytest.mark.parametrize(
    ("now", "news"),
    [
        (LOAD, False),
        (replace(LOAD, running=4), True),
        (replace(LOAD, waiting=0), True),
        (replace(LOAD, free_tokens=1008, waiting_tokens=75, tokens_per_s=95.0, seconds_per_request=2.2), False),
        (replace(LOAD, free_tokens=800), True),
        (replace(LOAD, waiting_tokens=0), True),
        (replace(LOAD, tokens_per_s=120.0), True),
        (replace(LOAD, seconds_per_request=0.0), True),
    ],
)
def test_small_changes_are_no_news(now: ReplicaLoad, news: bool) -> None:
    assert is_news(LOAD, None)
    assert is_news(now, LOAD) is news


async def test_the_engine_tells_its_load_from_when_it_is_watched_to_when_it_is_idle_again(
    make_engine: Callable[..., Engine],
) -> None:
    engine = make_engine(max_running=2)
    loads: list[ReplicaLoad] = []
    engine.watch_load(loads.append)
    await until(lambda: bool(loads))
    idle = loads[0]
    assert (idle.running, idle.waiting, idle.places, idle.waiting_tokens, idle.tokens_per_s) == (0, 0, 2, 0, 0)
    assert idle.free_tokens == engine.capacity.kv_capacity_tokens
    await asyncio.gather(*(collect(engine, request_for([1, 2, 3], 24)) for _ in range(5)))
    await until(lambda: loads[-1].running == 0)
    assert max(load.running for load in loads) == 2
    assert max(load.waiting for load in loads) >= 2
    assert loads[-1].waiting == 0
    assert loads[-1].tokens_per_s > 0
    assert loads[-1].seconds_per_request > 0
    assert len(loads) < engine.stats().counters.steps, "not for each step"
