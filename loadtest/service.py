"""A service of its own for a chaos run: started, looked at from outside, redeployed, and stopped whatever happens.

Promises to touch only processes that descend from the one it started. Ray's files live in a folder of the run's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

GRPC_SERVICES = "serve_app.api.grpc.services.add_services"
"""What a Serve config names for gRPC."""
START_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 60.0
ASKED_FOR_NOTHING = 8
"""Requests of which one at least reaches each of a few replicas; whoever looks for them all looks more than once."""
_POLL_S = 0.5
_LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True, slots=True)
class Replica:
    """One replica that Serve calls running."""

    worker_id: str
    """Ray's name for its process, as metrics have it."""
    process: psutil.Process


class ChaosService:
    """`serve-app serve` with `config` in a process of its own. A context manager: leaving it stops everything."""

    def __init__(self, config: dict[str, Any], port: int, log: Path, *, asks_for_key: bool = False) -> None:
        """What it prints goes to `log`, and the logs of its replicas to a folder of that name without its suffix.

        `asks_for_key`: each request needs `headers`, or `other_headers`.
        """
        self._asks_for_key = asks_for_key
        self.config = config
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        grpc_port = (config.get("grpc_options") or {}).get("port")
        self.grpc_target = f"127.0.0.1:{grpc_port}" if grpc_port else ""
        """Address of the gRPC port; "": there is none."""
        self._log = log
        self._folder = Path(tempfile.mkdtemp(prefix="chaos-"))
        self.token = secrets.token_hex(32)
        self._other_token = secrets.token_hex(32)
        self._process: psutil.Popen | None = None
        self._behind_haproxy = False
        self._dashboard = ""
        self._http = httpx.Client(timeout=10, headers={"Authorization": f"Bearer {self.token}"}, trust_env=False)

    def __enter__(self) -> ChaosService:
        path = self._folder / "serve.yaml"
        path.write_text(yaml.safe_dump(self.config, sort_keys=False))
        environment = os.environ | {
            "RAY_ADDRESS": "local",
            "RAY_TMPDIR": str(self._folder),
            "RAY_AUTH_TOKEN": self.token,
            # Ray tells a gauge for two of these intervals after it was set. A replica counts each second, the journals
            # each two, and Serve the tasks each five.
            "RAY_metrics_report_interval_ms": "2000",
            "RAY_SERVE_EVENT_LOOP_MONITORING_INTERVAL_S": "1",
            "SERVE_APP_STATE": str(self._folder),
        }
        if self._asks_for_key:
            environment |= {"SERVE_APP_API_KEYS": f"chaos={self.token},other={self._other_token}"}
        self._log.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self._log.with_suffix(""), ignore_errors=True)
        with self._log.open("w") as output:
            # A session of its own keeps the terminal's Ctrl-C to this process, which stops the service in order.
            self._process = psutil.Popen(
                [sys.executable, "-m", "serve_app.cli.main", "serve", str(path)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        return self

    def __exit__(self, *_: object) -> None:
        # A second Ctrl-C must not leave half of it behind; the stop is bounded in time.
        impatience = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._stop()
        finally:
            self._http.close()
            for number, handler in impatience.items():
                signal.signal(number, handler)
            if (self.logs / "serve").exists():  # what its replicas logged outlives the run's folder
                shutil.copytree(self.logs / "serve", self._log.with_suffix(""), dirs_exist_ok=True)
            shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def headers(self) -> dict[str, str]:
        """What each request to the service must have."""
        return {"Authorization": f"Bearer {self.token}"} if self._asks_for_key else {}

    @property
    def other_headers(self) -> dict[str, str]:
        """The same for another tenant."""
        return {"Authorization": f"Bearer {self._other_token}"} if self._asks_for_key else {}

    @property
    def logs(self) -> Path:
        """Ray's folder of logs of this run."""
        return self._folder / "ray" / "session_latest" / "logs"

    async def until_ready(self) -> None:
        """Return when every replica of the config runs and the model answers. Raises `RuntimeError`."""
        end = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < end:
            if self._process is None or self._process.poll() is not None:
                raise RuntimeError(f"the service ended before it was ready; see {self._log}")
            with contextlib.suppress(httpx.HTTPError):  # it does not listen yet
                if await asyncio.to_thread(self._ready):
                    return
            await asyncio.sleep(_POLL_S)
        raise RuntimeError(f"the service was not ready after {START_TIMEOUT_S:g} s; see {self._log}")

    def _ready(self) -> bool:
        return self._http.get(f"{self.url}/ready").status_code == 200 and self.settled()

    def processes(self, title: str) -> list[psutil.Process]:
        """Live processes of this service whose title begins with `title`, oldest first."""
        return sorted(self._titled(title), key=lambda process: process.create_time())

    def proxies(self) -> list[psutil.Process]:
        """What clients are connected to: HAProxy's processes, where Serve runs it, or Serve's own proxy.

        Once an HAProxy was seen only that counts, also while it is away: a proxy of Serve's own is there too then, for
        what HAProxy has no replica for.
        """
        haproxies = [process for process in self._family() if _name(process) == "haproxy"]
        self._behind_haproxy = self._behind_haproxy or bool(haproxies or self.processes("ray::HAProxyManager"))
        return haproxies if self._behind_haproxy else self.processes("ray::ProxyActor")

    def _family(self) -> list[psutil.Process]:
        return [] if self._process is None else self._process.children(recursive=True)

    def _titled(self, title: str) -> Iterator[psutil.Process]:
        for process in self._family():
            with contextlib.suppress(psutil.NoSuchProcess):
                if " ".join(process.cmdline()).startswith(title) and process.status() != psutil.STATUS_ZOMBIE:
                    yield process

    def replicas(self, deployment: str) -> list[Replica]:
        """Those that Serve calls running and whose process lives."""
        alive = {process.pid: process for process in self.processes(f"ray::ServeReplica:serve_app:{deployment}")}
        return [
            Replica(replica["worker_id"], alive[replica["pid"]])
            for replica in self._deployment(deployment)["replicas"]
            if replica["state"] == "RUNNING" and replica["pid"] in alive
        ]

    def settled(self) -> bool:
        """Whether Serve calls the application running, and every replica that it is to have is there and no other."""
        application = self._details()["applications"].get("serve_app", {})
        return application.get("status") == "RUNNING" and all(
            len(deployment["replicas"]) == deployment["target_num_replicas"] == len(self.replicas(name))
            for name, deployment in application["deployments"].items()
        )

    def _deployment(self, name: str) -> dict[str, Any]:
        application: dict[str, Any] = self._details()["applications"].get("serve_app", {})
        deployment: dict[str, Any] = application.get("deployments", {}).get(name, {"replicas": []})
        return deployment

    def _details(self) -> dict[str, Any]:
        details: dict[str, Any] = (
            self._http.get(f"{self.dashboard_url()}/api/serve/applications/").raise_for_status().json()
        )
        return details

    def deploy(self, config: dict[str, Any]) -> None:
        """What `serve deploy` does: Serve's REST API. Raises `httpx.HTTPError`."""
        self._http.put(f"{self.dashboard_url()}/api/serve/applications/", json=config).raise_for_status()
        self.config = config

    def dashboard_url(self) -> str:
        """Of this run's Ray. Raises `httpx.ConnectError` before it is up."""
        if not self._dashboard:
            self._dashboard = self._find_dashboard()
        return self._dashboard

    def _find_dashboard(self) -> str:
        """Ray takes the next free port from 8265 on, and says which in its log. Raises `httpx.ConnectError`."""
        log = self.logs / "dashboard.log"
        found = re.search(r"http address: (\S+?):(\d+)", log.read_text()) if log.exists() else None
        if found is None:
            raise httpx.ConnectError("Ray's dashboard is not up yet")
        return f"http://{found[1]}:{found[2]}"

    def metrics(self, names: set[str]) -> dict[tuple[str, str], float]:
        """(name, worker id) -> value of gauges, summed over their other labels, from Ray's Prometheus endpoints."""
        discovery = json.loads((self.logs.parent / "prom_metrics_service_discovery.json").read_text())
        values: dict[tuple[str, str], float] = {}
        for target in (target for group in discovery for target in group["targets"]):
            with contextlib.suppress(httpx.ConnectError):  # of a component that this Ray does not run
                for line in self._http.get(f"http://{target}/metrics").text.splitlines():
                    name, brace, rest = line.partition("{")
                    if brace and name in names:
                        labels = dict(_LABEL.findall(rest))
                        key = name, labels.get("WorkerId", "")
                        values[key] = values.get(key, 0.0) + float(rest.rpartition(" ")[2])
        return values

    def ask_for_nothing(self) -> None:
        """Have each ingress count its requests: it does so only when one comes or goes. Raises `httpx.HTTPError`."""
        for _ in range(ASKED_FOR_NOTHING):  # each by a connection of its own, or all would reach one replica
            httpx.get(f"{self.url}/v1/models", headers=self.headers, timeout=10, trust_env=False)

    def _stop(self) -> None:
        """SIGINT, then SIGTERM, then SIGKILL for whatever is left of its processes."""
        if self._process is None:
            return
        family = [self._process, *self._process.children(recursive=True)] if self._process.is_running() else []
        for process in family:
            _signal(process, signal.SIGCONT)
        for number, patience_s in ((signal.SIGINT, STOP_TIMEOUT_S), (signal.SIGTERM, 10.0)):
            if self._process.poll() is None:
                _signal(self._process, number)
                with contextlib.suppress(psutil.TimeoutExpired):
                    self._process.wait(patience_s)
        _, left = psutil.wait_procs(family, timeout=5)
        for process in left:
            _signal(process, signal.SIGKILL)


def _name(process: psutil.Process) -> str:
    """Of its program; "" when it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        if process.status() != psutil.STATUS_ZOMBIE:
            return str(process.name())
    return ""


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def derive_config(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """`base` with `overrides` laid over it, folder by folder."""
    merged = copy.deepcopy(base)
    for key, value in overrides.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = derive_config(merged[key], value) if both else value
    return merged
