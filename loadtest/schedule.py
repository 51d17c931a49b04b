"""Which faults a chaos run injects, and when: a function of the seed alone.

Promises a fixed mix for a number of faults; the seed decides order and times. Knows no process.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum


class Fault(StrEnum):
    """What is done to the service."""

    KILL_MODEL = "kill -9 a model replica"
    KILL_ALL_MODELS = "kill -9 every model replica"
    KILL_INGRESS = "kill -9 an ingress replica"
    KILL_PROXY = "kill -9 the proxy"
    FREEZE_MODEL = "freeze a model replica"
    FREEZE_INGRESS = "freeze an ingress replica"
    DROP_CLIENTS = "cut every resuming client"
    REDEPLOY = "redeploy, changed config"
    SCALE_UP = "one model replica more"
    SCALE_DOWN = "one model replica less"


MIX = {
    Fault.KILL_MODEL: 11,
    Fault.KILL_INGRESS: 7,
    Fault.FREEZE_MODEL: 5,
    Fault.DROP_CLIENTS: 4,
    Fault.KILL_PROXY: 3,
    Fault.REDEPLOY: 2,
    Fault.SCALE_UP: 2,
    Fault.SCALE_DOWN: 2,
    Fault.FREEZE_INGRESS: 2,
    Fault.KILL_ALL_MODELS: 2,
}
"""Of 40 faults. A model replica takes some 10 s to start on two busy cores, an ingress 8 s: more deaths than these
would leave no time in which the service is whole."""
_CONNECTION_KILLERS = frozenset({Fault.KILL_INGRESS, Fault.KILL_PROXY})


@dataclass(frozen=True, slots=True)
class Scheduled:
    """One fault of the plan."""

    at_s: float
    """From the start of the load; it waits longer when what it needs is not there yet."""
    fault: Fault

    @property
    def breaks_connections(self) -> bool:
        """Whether clients that did not ask for resume may see a connection error."""
        return self.fault in _CONNECTION_KILLERS


def plan(seed: int, count: int, seconds: float) -> list[Scheduled]:
    """`count` faults between 5 % and 90 % of `seconds`, in order: evenly apart, each moved by up to a third of that.

    Scaling alternates between up and down, so that the service never shrinks below what it began with.
    """
    generator = random.Random(f"faults {seed}")
    faults = [fault for fault, share in _apportion(count).items() for _ in range(share)]
    generator.shuffle(faults)
    scaled = 0
    for place, fault in enumerate(faults):
        if fault in (Fault.SCALE_UP, Fault.SCALE_DOWN):
            faults[place] = Fault.SCALE_DOWN if scaled % 2 else Fault.SCALE_UP
            scaled += 1
    first, last = 0.05 * seconds, 0.9 * seconds
    step = (last - first) / max(1, count)
    return [
        Scheduled(round(first + step * (place + 0.5 + generator.uniform(-1 / 3, 1 / 3)), 2), fault)
        for place, fault in enumerate(faults)
    ]


def _apportion(count: int) -> dict[Fault, int]:
    """The mix scaled to `count`, by largest remainders (Hamilton's method); equal ones in the mix's order."""
    whole = sum(MIX.values())
    exact = {fault: weight * count / whole for fault, weight in MIX.items()}
    shares = {fault: int(share) for fault, share in exact.items()}
    by_remainder = sorted(MIX, key=lambda fault: shares[fault] - exact[fault])
    for fault in by_remainder[: count - sum(shares.values())]:
        shares[fault] += 1
    return shares
