"""Whether a service has returned to rest: nothing runs, no page is used, no task or file descriptor is left over.

Compares counts of the processes that are there now with those of the processes that were there at rest before the
faults; dead ones have taken theirs along.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

from loadtest.faults import INGRESS, MODEL
from loadtest.service import ChaosService, Replica

ZERO = {
    MODEL: (
        "ray_serve_app_num_requests_running",
        "ray_serve_app_num_requests_waiting",
        "ray_serve_app_kv_cache_usage_perc",
    ),
    INGRESS: ("ray_serve_app_requests_in_progress",),
}
"""Gauges of each replica that are 0 at rest."""
KEPT = ("ray_serve_app_journals", "ray_serve_app_journal_bytes")
"""Gauges that are 0 again when `streams.expiry_s` is over: asked for in the end, not before the first fault. One
ingress replica counts for all."""
TASKS = "ray_serve_event_loop_tasks"
SLACK = {"tasks": 8, "threads": 16, "fds": 24}
"""What a process may have more than the largest of its kind before: connections to peers that came and went, and which
Ray closes late. A leak by the stream is larger after 300 of them."""
_TOLD_S = 2.5
"""Until what was counted can be read: an interval of Ray's (see `loadtest.service`), and a little."""
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
    missing: list[str] = field(default_factory=list)
    """What should be told and is not, in words: a gauge that is lost says nothing about rest."""


def count(service: ChaosService) -> Counts:
    """Look at every replica that serves and at the proxy. Raises `httpx.HTTPError`."""
    values = service.metrics({*(name for names in ZERO.values() for name in names), *KEPT, TASKS})
    replicas = {deployment: service.replicas(deployment) for deployment in ZERO}
    counts = Counts()
    for deployment, names in ZERO.items():
        for name in (*names, TASKS):
            told = _told(values, name, replicas[deployment])
            counts.missing += [
                f"{name} of {deployment} {replica.process.pid} is missing"
                for replica in replicas[deployment]
                if replica.worker_id not in told
            ]
            if name in names:
                counts.gauges[name] = sum(told.values())
            else:
                counts.largest[deployment] = {"tasks": int(max(told.values(), default=0))}
        counts.largest[deployment] |= _largest([replica.process for replica in replicas[deployment]])
    for name in KEPT:
        told = _told(values, name, replicas[INGRESS])
        counts.kept[name] = sum(told.values())
        if not told:
            counts.missing.append(f"{name} is missing")
    counts.largest["proxy"] = _largest(service.proxies())
    return counts


def _told(values: dict[tuple[str, str], float], name: str, replicas: Sequence[Replica]) -> dict[str, float]:
    """Worker id -> value, of those replicas that tell it."""
    return {
        replica.worker_id: values[name, replica.worker_id]
        for replica in replicas
        if (name, replica.worker_id) in values
    }


def _largest(processes: Sequence[psutil.Process]) -> dict[str, int]:
    sizes = {"threads": 0, "fds": 0}
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            sizes = {
                "threads": max(sizes["threads"], process.num_threads()),
                "fds": max(sizes["fds"], process.num_fds()),
            }
    return sizes


def differences(now: Counts, before: Counts | None) -> list[str]:
    """What is not as it should be at rest, in words; without `before` only of the gauges of now."""
    wrong = [*now.missing, *(f"{name} is {value:g}" for name, value in now.gauges.items() if value)]
    if before is None:
        return wrong
    wrong += [f"{name} is {value:g}" for name, value in now.kept.items() if value]
    for place, sizes in before.largest.items():
        there = now.largest.get(place, {})
        if not any(there.values()):
            wrong.append(f"{place} is not there")
        for kind, size in sizes.items():
            if (number := there.get(kind, 0)) > size + SLACK[kind]:
                wrong.append(f"{place} has {number} {kind}, {size} before")
    return wrong


async def until_idle(service: ChaosService, before: Counts | None) -> tuple[Counts, list[str]]:
    """Look until all is at rest and whole again; the last look, and what is wrong in it.

    Without `before` only the gauges count, and `kept` is the most that any look saw: it expires while others are waited
    for.
    """
    end = time.monotonic() + PATIENCE_S
    most: dict[str, float] = {}
    while True:
        try:
            await asyncio.to_thread(service.ask_for_nothing)
            await asyncio.sleep(_TOLD_S)
            now = await asyncio.to_thread(count, service)
            wrong = differences(now, before)
            if before is None:
                now.kept = most = {name: max(value, most.get(name, 0.0)) for name, value in now.kept.items()}
            if not await asyncio.to_thread(service.settled):
                wrong.append("Serve has not all replicas running")
        except httpx.HTTPError as error:
            now, wrong = Counts(), [f"the counts can't be read: {error}"]
            await asyncio.sleep(_TOLD_S)
        if not wrong or time.monotonic() > end:
            return now, wrong


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
