"""Whether a service has returned to rest: nothing runs, no page is used, no task or file descriptor is left over.

Compares counts of the processes that are there now with those of the processes that were there at rest before the
faults; dead ones have taken theirs along.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import httpx

from loadtest.faults import INGRESS, MODEL
from loadtest.service import ChaosService

ZERO = (
    "ray_serve_app_running",
    "ray_serve_app_waiting",
    "ray_serve_app_cache_use",
    "ray_serve_app_requests_in_progress",
)
"""Gauges that are 0 at rest."""
KEPT = ("ray_serve_app_journals", "ray_serve_app_journal_bytes")
"""Gauges that are 0 again when `streams.expiry_s` is over: asked for in the end, not before the first fault."""
TASKS = "ray_serve_event_loop_tasks"
SLACK = {"tasks": 8, "threads": 16, "fds": 24}
"""What a process may have more than the largest of its kind before: connections to peers that came and went, and which
Ray closes late. A leak by the stream is larger after 300 of them."""
_LOOK_S = 2.0
PATIENCE_S = 120.0
"""For dead replicas to be replaced (20 s when all have died at the end), for streams without a reader to stop (30 s by
`streams.grace_s`) and for their journals to expire."""


@dataclass(slots=True)
class Counts:
    """One look."""

    gauges: dict[str, float] = field(default_factory=dict)
    """Sum over the replicas that serve."""
    kept: dict[str, float] = field(default_factory=dict)
    """Likewise, of `KEPT`."""
    largest: dict[str, dict[str, int]] = field(default_factory=dict)
    """{deployment or "proxy": {tasks, threads, fds}} of its largest process."""


def count(service: ChaosService) -> Counts:
    """Look at every replica that serves and at the proxy. Raises `httpx.HTTPError`."""
    values = service.metrics({*ZERO, *KEPT, TASKS})
    counts = Counts(dict.fromkeys(ZERO, 0.0), dict.fromkeys(KEPT, 0.0))
    for deployment in (MODEL, INGRESS):
        sizes: dict[str, int] = defaultdict(int)
        for replica in service.replicas(deployment):
            for gauges in (counts.gauges, counts.kept):
                for name in gauges:
                    gauges[name] += values.get((name, replica.worker_id), 0.0)
            now = {
                "tasks": int(values.get((TASKS, replica.worker_id), 0)),
                "threads": replica.process.num_threads(),
                "fds": replica.process.num_fds(),
            }
            sizes.update({kind: max(sizes[kind], number) for kind, number in now.items()})
        counts.largest[deployment] = dict(sizes)
    for proxy in service.processes("ray::ProxyActor"):
        counts.largest["proxy"] = {"threads": proxy.num_threads(), "fds": proxy.num_fds()}
    return counts


def differences(now: Counts, before: Counts | None) -> list[str]:
    """What is not as it should be at rest, in words; without `before` only of the gauges of now."""
    wrong = [f"{name} is {value:g}" for name, value in now.gauges.items() if value]
    if before is None:
        return wrong
    wrong += [f"{name} is {value:g}" for name, value in now.kept.items() if value]
    for place, sizes in before.largest.items():
        for kind, size in sizes.items():
            number = now.largest.get(place, {}).get(kind, 0)
            if number > size + SLACK[kind]:
                wrong.append(f"{place} has {number} {kind}, {size} before")
            if not number and size:
                wrong.append(f"{place} is not there")
    return wrong


async def until_idle(service: ChaosService, before: Counts | None) -> tuple[Counts, list[str]]:
    """Look until all is at rest and whole again; the last look, and what is wrong in it.

    Without `before` only the gauges count.
    """
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            now = await asyncio.to_thread(count, service)
            wrong = differences(now, before)
            if not await asyncio.to_thread(service.settled):
                wrong.append("Serve has not all replicas running")
        except httpx.HTTPError as error:
            now, wrong = Counts(), [f"the counts can't be read: {error}"]
        if not wrong or time.monotonic() > end:
            return now, wrong
        await asyncio.sleep(_LOOK_S)


def as_json(before: Counts, now: Counts, wrong: list[str]) -> dict[str, Any]:
    """For the report."""
    return {
        "ok": not wrong,
        "wrong": wrong,
        "gauges": now.gauges,
        "kept": {"before": before.kept, "after": now.kept},
        "before": before.largest,
        "after": now.largest,
    }
