from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from simulated_time import simulated_time

from serve_app.idle_timeout import IdleTimeout, TimedWaiter

EARLY_S = 1e-4
"""The simulated clock moves a little with each iteration of the loop."""


class Bell:
    """A timeout, and when it was reached."""

    def __init__(self, *, ignores_stalls: bool = False) -> None:
        self.loop: Any = asyncio.get_running_loop()
        self.began = self.loop.time()
        self.rang_s: list[float] = []
        self.timers = 0
        self.timeout = IdleTimeout(
            self.loop, lambda: self.rang_s.append(self.loop.time() - self.began), ignores_stalls=ignores_stalls
        )
        call_at = self.loop.call_at

        def counted(*arguments: Any, **options: Any) -> Any:
            self.timers += getattr(arguments[1], "__self__", None) is self.timeout
            return call_at(*arguments, **options)

        self.loop.call_at = counted

    def stands_still(self, seconds: float) -> None:
        """The process is stopped for so long: no timer goes off meanwhile."""
        time, self.loop.time = self.loop.time, lambda: time() + seconds

    def rings(self, *times_s: float) -> bool:
        return self.rang_s == [pytest.approx(time_s, abs=EARLY_S) for time_s in times_s]


@asynccontextmanager
async def made(*, ignores_stalls: bool) -> AsyncIterator[Bell]:
    with simulated_time():
        bell = Bell(ignores_stalls=ignores_stalls)
        yield bell
        bell.timeout.close()
        del bell.loop.call_at


@pytest.fixture
async def bell() -> AsyncIterator[Bell]:
    async with made(ignores_stalls=False) as one:
        yield one


@pytest.fixture
async def patient() -> AsyncIterator[Bell]:
    async with made(ignores_stalls=True) as one:
        yield one


async def test_a_limit_is_reached_once(bell: Bell) -> None:
    bell.timeout.set(1.0)
    await asyncio.sleep(5)
    assert bell.rings(1.0)
    bell.timeout.set(1.0)
    await asyncio.sleep(5)
    assert bell.rings(1.0, 6.0)


async def test_a_limit_that_is_put_off_costs_few_timers_and_is_kept_to_the_moment(bell: Bell) -> None:
    last_s = 0.0
    for _ in range(1000):
        last_s = bell.loop.time() - bell.began
        bell.timeout.set(1.0)
        await asyncio.sleep(0.01)
    await asyncio.sleep(5)
    assert bell.rings(last_s + 1.0)
    assert bell.timers <= 12


async def test_an_earlier_limit_takes_the_place_of_a_later_one(bell: Bell) -> None:
    bell.timeout.set(5.0)
    bell.timeout.set(1.0)
    await asyncio.sleep(9)
    assert bell.rings(1.0)


async def test_no_limit_is_never_reached(bell: Bell) -> None:
    bell.timeout.set(1.0)
    bell.timeout.clear()
    await asyncio.sleep(0.5)
    bell.timeout.set(1.0)  # the timer of the first is still there, and goes off before
    await asyncio.sleep(0.9)
    assert bell.rang_s == []
    await asyncio.sleep(0.2)
    assert bell.rings(1.5)
    bell.timeout.set(1.0)
    bell.timeout.close()
    await asyncio.sleep(5)
    assert bell.rings(1.5)
    bell.timeout.set(1.0)  # it can be used again
    await asyncio.sleep(2)
    assert len(bell.rang_s) == 2


@pytest.mark.parametrize("stalled_s", [0.6, 1.3, 30.0])
async def test_after_a_stall_a_patient_one_hears_first_what_came_meanwhile(patient: Bell, stalled_s: float) -> None:
    patient.timeout.set(1.0)
    await asyncio.sleep(0.4)
    patient.stands_still(stalled_s)  # it was to look after half a second: 0.1 s of it count
    await asyncio.sleep(5)
    assert patient.rings(0.9 + stalled_s)


async def test_a_limit_that_is_set_after_a_stall_is_as_long_as_any(patient: Bell) -> None:
    patient.timeout.set(1.0)
    await asyncio.sleep(0.3)
    patient.stands_still(3.0)
    patient.timeout.set(1.0)  # what came is read in the turn in which the loop goes on, before it looks at its timers
    await asyncio.sleep(5)
    assert patient.rings(4.3)


async def test_a_stall_just_before_the_limit_leaves_time_to_hear(patient: Bell) -> None:
    patient.timeout.set(1.0)
    await asyncio.sleep(0.7)
    patient.stands_still(0.6)
    await asyncio.sleep(0)
    for _ in range(3):
        await asyncio.sleep(0)
    assert patient.rang_s == []
    patient.timeout.set(1.0)  # the reader's task has had its turn
    await asyncio.sleep(0.9)
    assert patient.rang_s == []


async def test_one_that_judges_nobody_rings_at_once(bell: Bell) -> None:
    """A heartbeat that waits makes others impatient."""
    bell.timeout.set(1.0)
    await asyncio.sleep(0.5)
    bell.stands_still(3.2)
    await asyncio.sleep(5)
    assert bell.rings(3.7)


@pytest.mark.parametrize("turn_s", [0.13, 0.6])
async def test_no_number_of_stalls_puts_a_limit_off_for_ever(patient: Bell, turn_s: float) -> None:
    patient.timeout.set(1.0)
    for _ in range(60):
        patient.stands_still(turn_s)
        await asyncio.sleep(0)
    assert len(patient.rang_s) == 1
    assert patient.rang_s[0] < 3 * (0.5 + turn_s), "each look counts for half a second"


async def test_a_limit_that_is_put_off_after_a_stall_is_not_reached(patient: Bell) -> None:
    patient.timeout.set(1.0)
    patient.stands_still(3.0)
    await asyncio.sleep(0.01)
    patient.timeout.set(1.0)  # what had come meanwhile
    await asyncio.sleep(0.9)
    assert patient.rang_s == []
    await asyncio.sleep(0.2)
    assert patient.rings(4.01)


@pytest.mark.parametrize("ignores_stalls", [False, True])
@pytest.mark.parametrize(("delay_s", "turn_s"), [(0.1, 0.15), (0.0003, 0.0)])
def test_on_uvloop_a_late_loop_reaches_the_limit_once(delay_s: float, turn_s: float, ignores_stalls: bool) -> None:
    """There `call_at` returns a handle without a time for what is due already, or in less than half a millisecond."""
    uvloop = pytest.importorskip("uvloop")

    class Late(uvloop.Loop):  # type: ignore[misc,name-defined]
        """The process stands still for `turn_s` after each look at the clock."""

        def time(self) -> float:
            now = float(super().time())
            time.sleep(turn_s)
            return now

    async def run() -> tuple[float, list[float]]:
        loop = asyncio.get_running_loop()
        over = asyncio.Event()
        errors: list[object] = []
        loop.set_exception_handler(lambda _, context: (errors.append(context), over.set()))
        rang_s: list[float] = []
        timeout = IdleTimeout(loop, lambda: (rang_s.append(loop.time()), over.set()), ignores_stalls=ignores_stalls)
        timeout.set(delay_s)
        set_again_s = loop.time()
        timeout.set(delay_s)  # finds the timer of the first, whose moment has passed
        await over.wait()
        for _ in range(3):
            await asyncio.sleep(0)
        timeout.close()
        assert errors == []
        return set_again_s, rang_s

    with asyncio.Runner(loop_factory=Late) as runner:
        set_again_s, rang_s = runner.run(run())
    assert len(rang_s) == 1
    assert rang_s[0] >= set_again_s + delay_s


async def test_whoever_waits_is_woken_at_once_or_when_the_time_is_over() -> None:
    with simulated_time():
        loop = asyncio.get_running_loop()
        waiter = TimedWaiter(loop)
        began = loop.time()
        await waiter.wait(2.0)
        assert loop.time() - began == pytest.approx(2.0, abs=EARLY_S)
        loop.call_later(0.5, waiter.wake)
        await waiter.wait(60.0)
        assert loop.time() - began == pytest.approx(2.5, abs=EARLY_S)
        waiter.wake()  # nobody waits: it is not kept for later
        await waiter.wait(1.0)
        assert loop.time() - began == pytest.approx(3.5, abs=EARLY_S)
        waiter.close()
