"""What the injector of a chaos run does to processes: to those that it is to hit, and to no others."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from loadtest import faults
from loadtest.faults import Injector
from loadtest.schedule import Fault, Scheduled
from loadtest.service import ChaosService, free_port

PROXY, MANAGER = "ray::ProxyActor", "ray::HAProxyManager"


class Family:
    """A service of processes that only have the names of Serve's."""

    def __init__(self, folder: Path, *titles: str) -> None:
        sleep = shutil.which("sleep")
        assert sleep is not None
        (folder / "haproxy").symlink_to(sleep)
        begin = {"haproxy": f"{folder / 'haproxy'} 60"}
        script = "".join(f"{begin.get(title, f'(exec -a {title} sleep 60)')} & " for title in titles)
        self.service = ChaosService({}, free_port(), folder / "log")
        self.service._process = psutil.Popen(["bash", "-c", f"{script} wait"], stdout=subprocess.DEVNULL)
        self.until(*titles)

    def until(self, *titles: str) -> None:
        """Wait until it has these processes."""
        deadline = time.monotonic() + 20
        while self.names() != sorted(titles):
            assert time.monotonic() < deadline, self.names()
            time.sleep(0.01)

    def names(self) -> list[str]:
        """Of its live processes."""
        assert self.service._process is not None
        found = []
        for process in self.service._process.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                with_arguments = process.cmdline() if process.status() != psutil.STATUS_ZOMBIE else []
                if with_arguments and process.name() != "bash":
                    found.append(with_arguments[0].rpartition("/")[2])
        return sorted(found)

    def end(self) -> None:
        assert self.service._process is not None
        for process in (*self.service._process.children(), self.service._process):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.service._process.wait()
        self.service._http.close()
        self.service._folder.rmdir()


@pytest.fixture
def family(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Family]:
    family = Family(tmp_path, *request.param)
    yield family
    family.end()


async def kill_the_proxy(family: Family) -> Injector:
    injector = Injector(family.service, lambda: 0)
    await injector.run([Scheduled(0.0, Fault.KILL_PROXY)], time.monotonic())
    return injector


@pytest.mark.parametrize(
    ("family", "left"),
    [
        pytest.param(("haproxy", "haproxy", MANAGER, PROXY), [MANAGER, PROXY], id="HAProxy"),
        pytest.param((PROXY, "other"), ["other"], id="Serve's own"),
    ],
    indirect=["family"],
)
async def test_the_proxy_that_clients_are_connected_to_is_killed(
    family: Family, left: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "_LOOK_S", 0.01)
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", family.service.port)
    async with server:
        injector = await kill_the_proxy(family)
    family.until(*left)
    (done,) = injector.done
    assert (done.fault, done.hits) == (Fault.KILL_PROXY, 2 if MANAGER in left else 1)
    assert len(injector.proxy_outages_s) == 1


@pytest.mark.parametrize("family", [("haproxy", MANAGER, PROXY)], indirect=True)
async def test_while_haproxy_is_away_serves_own_proxy_is_not_taken_for_it(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    (haproxy,) = family.service.proxies()
    haproxy.kill()
    family.until(MANAGER, PROXY)
    monkeypatch.setattr(faults, "_LOOK_S", 0.01)
    monkeypatch.setattr(faults, "PATIENCE_S", 0.05)
    injector = await kill_the_proxy(family)
    assert family.names() == [MANAGER, PROXY]
    assert injector.done == []
    assert injector.skipped == [(Fault.KILL_PROXY, "LookupError: no proxy runs")]


@pytest.mark.parametrize("family", [(PROXY,)], indirect=True)
async def test_a_proxy_that_stays_away_has_no_outage_that_ended(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "_LOOK_S", 0.01)
    monkeypatch.setattr(faults, "PROXY_BACK_S", 0.05)
    injector = await kill_the_proxy(family)
    assert len(injector.done) == 1
    assert injector.proxy_outages_s == []


async def test_a_fault_that_can_not_be_carried_out_is_skipped_and_named() -> None:
    class Unreachable:
        config: dict[str, Any] = {  # noqa: RUF012 - of one object
            "applications": [{"args": {"model_server": {"num_replicas": 2}}}]
        }

        def deploy(self, config: dict[str, Any]) -> None:
            raise httpx.ConnectError("refused")

    service: Any = Unreachable()
    injector = Injector(service, lambda: 0)
    await injector.run([Scheduled(0.0, Fault.REDEPLOY)], time.monotonic())
    assert injector.done == []
    assert injector.skipped == [(Fault.REDEPLOY, "ConnectError: refused")]
