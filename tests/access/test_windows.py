"""The sliding window counter, against the package whose algorithm it is."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from exploring import cases
from hypothesis import given, settings
from hypothesis import strategies as st
from limited_callers import NOON_S, Clock
from limits import RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage, memory
from limits.aio.strategies import SlidingWindowCounterRateLimiter

from serve_app.access.windows import MINUTE_S, Window

STEPS = st.lists(
    st.tuples(st.one_of(st.integers(0, 40), st.integers(0, 800)), st.integers(1, 12)), min_size=1, max_size=40
)
"""(quarters of a second that pass, what is used then)."""


def uses(window: Window, now_s: float, most: int, cost: int) -> bool:
    """Use `cost` if there is room."""
    window.roll(now_s)
    if window.used(now_s) + cost > most:
        return False
    window.current += cost
    return True


@settings(max_examples=cases(30, exploring=1000), deadline=None)
@given(STEPS, st.integers(1, 30))
def test_it_decides_as_the_package_limits_does(steps: list[tuple[int, int]], most: int) -> None:
    # A moment at which no share of a window is a round number: rounding could go either way there.
    clock, window = Clock(NOON_S + 0.0317), Window(MINUTE_S)

    async def decisions() -> None:
        limiter, item = SlidingWindowCounterRateLimiter(MemoryStorage()), RateLimitItemPerMinute(most)
        for quarters, cost in steps:
            clock.now_s += quarters / 4
            assert uses(window, clock.now_s, most, cost) == await limiter.hit(item, "somebody", cost=cost)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "time", SimpleNamespace(time=clock))
        asyncio.run(decisions())


@settings(max_examples=cases(80, exploring=1000), deadline=None)
@given(STEPS, st.integers(12, 30), st.integers(1, 12))
def test_a_wait_is_no_longer_and_no_shorter_than_needed(steps: list[tuple[int, int]], most: int, cost: int) -> None:
    window, now_s = Window(MINUTE_S), NOON_S
    for quarters, used in steps:
        now_s += quarters / 4
        uses(window, now_s, most, used)
    if window.used(now_s) + cost <= most:
        return
    wait_s = window.wait_s(now_s, most, cost)
    for later_s, fits in ((wait_s, True), (wait_s - 0.01, False)):
        if later_s > 0:
            then = Window(MINUTE_S, window.index, window.current, window.previous)
            assert uses(then, now_s + later_s, most, cost) == fits


@given(STEPS)
def test_after_its_reset_nothing_counts(steps: list[tuple[int, int]]) -> None:
    window, now_s = Window(MINUTE_S), NOON_S
    for quarters, used in steps:
        now_s += quarters / 4
        uses(window, now_s, 30, used)
    now_s += window.reset_s(now_s, 0) + 1e-6
    window.roll(now_s)
    assert window.used(now_s) == 0


def test_a_clock_that_goes_back_frees_nothing() -> None:
    window = Window(MINUTE_S)
    assert uses(window, NOON_S, 5, 5)
    assert not uses(window, NOON_S - 3600, 5, 1)
