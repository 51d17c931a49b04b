"""Carries out a schedule of faults on a running service, and notes what was done to whom and when.

Promises that whatever was frozen is thawed again. Knows no client.
"""

from __future__ import annotations

import asyncio
import copy
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import psutil

from loadtest.schedule import Fault, Scheduled
from loadtest.service import ChaosService, Replica

FREEZE_S = 8.0
"""Longer than the silence after which a stream moves (5 s), shorter than what Serve takes for death (30 s)."""
PATIENCE_S = 20.0
"""How long a fault waits for a replica to hit, and for one beside it."""
APART_S = 2.0
"""Between two faults at least, also where one that waited has made the next ones late."""
PROXY_BACK_S = 120.0
"""After which a proxy that does not listen again is given up."""
_LOOK_S = 0.5
MODEL, INGRESS = "ModelServer", "Ingress"
_HARMLESS_CHANGE = (600.0, 601.0)
"""`api.request_timeout_s` alternates between them at redeploys: another config to Serve, the same to clients."""
_DEPLOYMENT = {
    Fault.KILL_MODEL: MODEL,
    Fault.KILL_ALL_MODELS: MODEL,
    Fault.FREEZE_MODEL: MODEL,
    Fault.KILL_INGRESS: INGRESS,
    Fault.FREEZE_INGRESS: INGRESS,
}


@dataclass(frozen=True, slots=True)
class Injected:
    """One fault that was carried out."""

    fault: Fault
    at_s: float
    """Of `time.monotonic`."""
    hits: int
    """Processes or connections that it hit; of a redeploy or scaling 1."""
    peers: int = 0
    """Other replicas of the same deployment that were there and not frozen."""


class Injector:
    """Runs one schedule against one service."""

    def __init__(self, service: ChaosService, cut_clients: Callable[[], int]) -> None:
        """`cut_clients` drops the connections of all clients that resume, and returns how many."""
        self._service = service
        self._cut_clients = cut_clients
        self._frozen: dict[psutil.Process, asyncio.Task[None]] = {}
        self._extra = 0
        self._watching: set[asyncio.Task[None]] = set()
        self.proxy_outages_s: list[float] = []
        """After each kill of the proxy, until something listened on its port again; of one that stayed away nothing."""
        self.done: list[Injected] = []
        self.skipped: list[tuple[Fault, str]] = []

    async def run(self, schedule: list[Scheduled], began_s: float) -> None:
        """Carry out all of it; one that finds nothing to hit is skipped."""
        try:
            not_before_s = began_s
            for scheduled in schedule:
                await asyncio.sleep(max(not_before_s, began_s + scheduled.at_s) - time.monotonic())
                await self._carry_out(scheduled.fault, began_s)
                not_before_s = time.monotonic() + APART_S
            await asyncio.gather(*self._frozen.values(), *self._watching)  # the last ones take their time too
        finally:
            for task in (*self._frozen.values(), *self._watching):
                task.cancel()
            for process in self._frozen:
                _thaw(process)

    async def _carry_out(self, fault: Fault, began_s: float) -> None:
        try:
            injected = await self._inject(fault)
        except (LookupError, httpx.HTTPError, psutil.NoSuchProcess) as error:
            self.skipped.append((fault, f"{type(error).__name__}: {error}"))
            print(f"{time.monotonic() - began_s:6.1f} s  skipped: {fault} ({error})", flush=True)
            return
        self.done.append(injected)
        beside = f", {injected.peers} beside" if fault in _DEPLOYMENT else ""
        print(f"{injected.at_s - began_s:6.1f} s  {fault} ({injected.hits} hit{beside})", flush=True)

    async def _inject(self, fault: Fault) -> Injected:
        if fault is Fault.DROP_CLIENTS:
            return await self._cut()
        if fault is Fault.KILL_PROXY:
            return await self._kill_proxy()
        if fault in (Fault.REDEPLOY, Fault.SCALE_UP, Fault.SCALE_DOWN):
            self._extra += {Fault.SCALE_UP: 1, Fault.SCALE_DOWN: -1}.get(fault, 0)
            config = changed(self._service.config, redeploy=fault is Fault.REDEPLOY, extra_models=self._extra)
            at_s = time.monotonic()
            await asyncio.to_thread(self._service.deploy, config)
            return Injected(fault, at_s, 1)
        return await self._hit_replica(fault)

    async def _cut(self) -> Injected:
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            if hits := self._cut_clients():
                return Injected(Fault.DROP_CLIENTS, time.monotonic(), hits)
            await asyncio.sleep(_LOOK_S)
        raise LookupError("no client that resumes was connected")

    async def _kill_proxy(self) -> Injected:
        end = time.monotonic() + 2 * PATIENCE_S
        while not (proxies := self._service.proxies()):
            if time.monotonic() > end:
                raise LookupError("no proxy runs")
            await asyncio.sleep(_LOOK_S)
        at_s = time.monotonic()
        for proxy in proxies:
            proxy.kill()
        watch = asyncio.create_task(self._until_listening(at_s))
        self._watching.add(watch)
        watch.add_done_callback(self._watching.discard)
        return Injected(Fault.KILL_PROXY, at_s, len(proxies))

    async def _until_listening(self, since_s: float) -> None:
        while time.monotonic() - since_s < PROXY_BACK_S:
            await asyncio.sleep(_LOOK_S)
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", self._service.port)
            except OSError:
                continue
            writer.close()
            self.proxy_outages_s.append(round(time.monotonic() - since_s, 1))
            return

    async def _hit_replica(self, fault: Fault) -> Injected:
        there = await self._at_least_two(_DEPLOYMENT[fault])
        victims = there if fault is Fault.KILL_ALL_MODELS else there[:1]  # the oldest: the one with the most streams
        at_s = time.monotonic()
        for victim in victims:
            if fault in (Fault.FREEZE_MODEL, Fault.FREEZE_INGRESS):
                victim.process.suspend()
                self._frozen[victim.process] = asyncio.create_task(self._thaw_later(victim.process))
            else:
                victim.process.kill()
        return Injected(fault, at_s, len(victims), len(there) - len(victims))

    async def _at_least_two(self, deployment: str) -> list[Replica]:
        """Replicas that serve, two of them if they come in time. Raises `LookupError` when there is none."""
        end = time.monotonic() + PATIENCE_S
        while True:
            running = await asyncio.to_thread(self._service.replicas, deployment)
            there = [replica for replica in running if replica.process not in self._frozen]
            if len(there) > 1 or (there and time.monotonic() > end):
                return sorted(there, key=lambda replica: replica.process.create_time())
            if time.monotonic() > end + PATIENCE_S:
                raise LookupError(f"no replica of {deployment} serves")
            await asyncio.sleep(_LOOK_S)

    async def _thaw_later(self, process: psutil.Process) -> None:
        await asyncio.sleep(FREEZE_S)
        _thaw(process)
        del self._frozen[process]


def _thaw(process: psutil.Process) -> None:
    try:
        process.send_signal(signal.SIGCONT)
    except psutil.NoSuchProcess:
        return  # Serve gave it up meanwhile


def changed(config: dict[str, Any], *, redeploy: bool, extra_models: int) -> dict[str, Any]:
    """`config` as it is deployed next. Scaling stands outside `args`, whose change would restart every replica."""
    following = copy.deepcopy(config)
    application = following["applications"][0]
    if redeploy:
        api = application["args"].setdefault("api", {})
        before = api.get("request_timeout_s", _HARMLESS_CHANGE[0])
        api["request_timeout_s"] = next(value for value in _HARMLESS_CHANGE if value != before)
    models = application["args"]["model_server"]["num_replicas"] + extra_models
    application["deployments"] = [{"name": MODEL, "num_replicas": models}]
    return following
