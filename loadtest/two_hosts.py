"""Does every accepted stream end in the same text when a host, or the network between two, fails?

`sudo loadtest/two_hosts.sh` (see there) makes two hosts of one machine and runs this on a third. It starts a cluster
that asks for a token as docs/operations.md says, with a firewall on each host that closes all but the ports listed
there, deploys configs/serve.cluster.yaml with the demo model (the ingress on one host, a model replica on each), and
asks questions while links are slowed and cut, and while the second host is drained, lost and comes back. Exit status 1:
an answer was lost or changed, or a stranger got in.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import yaml

from loadtest.chaos import OVERRIDES, judged_against, moved_requests, undisturbed
from loadtest.chaos_client import TIMEOUT, ChaosClient
from loadtest.chaos_report import Judged
from loadtest.hosts import Host, missing_programs
from loadtest.outcome import Outcome
from loadtest.service import derive_config
from loadtest.verdicts import Answer, Verdict
from loadtest.workload import Question, Visit, questions, visits

CONFIG = Path("configs/serve.cluster.yaml")
ADDRESSES = {"a": "10.77.0.1", "b": "10.77.0.2"}
PUBLIC_PORTS = (8000, 9000)
START_TIMEOUT_S = 300.0
ARRIVALS_S = 2.0
"""The clients of a phase come within this time."""
FAULT_AT_S = 2.5
"""When the fault of a phase comes, after its first client."""
IN_FLIGHT = 20
SLOW_RATE = "32kbit"
SLOW_S = 10.0
SHORT_CUT_S = 2.0
DRAIN_NOTICE_S = 60
CLUSTER_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_worker_niceness": "0",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve_app.deployments.serve_http.middlewares",
    "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": "67108864",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": "67108864",
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
}
"""As the head of the config has it."""


def cluster_config() -> dict[str, Any]:
    """The cluster's config with the demo model, a model replica for each host and one ingress on the first."""
    config: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
    arguments = config["applications"][0]["args"]
    for section in ("model_server", "ingress"):
        del arguments[section]["autoscaling"]
    del arguments["engine"]["gpu_memory_fraction"], arguments["model"]["dtype"]
    config["applications"][0]["args"] = derive_config(
        derive_config(arguments, OVERRIDES),
        {
            "model": {"source": "demo"},
            "model_server": {"num_replicas": 2, "num_cpus": 0.1, "num_gpus": 0, "resources": {"model": 1}},
            "ingress": {"num_replicas": 1, "num_cpus": 0.1, "resources": {"door": 1}},
        },
    )
    return config


class TwoHosts:
    """The cluster and the service on it. `url`, `grpc_target` and `logs` are as `loadtest.service.ChaosService` has
    them."""

    def __init__(self, prefix: str, folder: Path) -> None:
        self._token = secrets.token_hex(32)
        environment = CLUSTER_ENVIRONMENT | {"RAY_AUTH_TOKEN": self._token}
        self.a, self.b = (Host(prefix, name, address, folder, environment) for name, address in ADDRESSES.items())
        self.url = f"http://{self.a.address}:{PUBLIC_PORTS[0]}"
        self.grpc_target = f"{self.a.address}:{PUBLIC_PORTS[1]}"
        self._folder = folder
        self._deploying: subprocess.Popen[bytes] | None = None

    @property
    def logs(self) -> Path:
        """Ray's logs on the host of the ingress, whose `session_latest` leads astray from outside of it."""
        sessions = sorted((self.a.folder / "ray").glob("session_2*"))
        return (sessions[-1] if sessions else self.a.folder) / "logs"

    def start(self) -> None:
        """Firewalls, Ray on both hosts, and the service. Raises `RuntimeError`."""
        for host in (self.a, self.b):
            host.set_firewall(list(ADDRESSES.values()), PUBLIC_PORTS)
        self.a.start_ray(None, '{"model": 1, "door": 2}')
        until(lambda: self.dashboard("/api/version") is not None, "Ray on the first host")
        self.join_b()
        path = self._folder / "serve.yaml"
        path.write_text(yaml.safe_dump(cluster_config(), sort_keys=False))
        shutil.copy(path, self.a.folder / "serve.yaml")
        self._deploying = self.a.start(
            ["env", "RAY_ADDRESS=auto", sys.executable, "-m", "serve_app.cli.main", "serve", "/tmp/serve.yaml"],
            "serve-app.log",
        )
        self.until_whole()

    def join_b(self) -> None:
        """Ray on the second host, until the first knows of it."""
        self.b.start_ray(self.a.address, '{"model": 1}')
        until(lambda: self.node_of_b() is not None, "Ray on the second host")

    def until_whole(self) -> None:
        """Return when a model replica runs on each host and the model answers. Raises `RuntimeError`."""

        def whole() -> bool:
            if self._deploying is not None and self._deploying.poll() is not None:
                raise RuntimeError(f"serve-app ended: {(self.a.folder / 'serve-app.log').read_text()[-800:]}")
            return self.replicas() == sorted(ADDRESSES.values())

        until(whole, "a model replica on each host")
        until(lambda: httpx.get(f"{self.url}/ready", timeout=10).status_code == 200, "the model")

    def replicas(self) -> list[str]:
        """Addresses of the hosts of the model replicas that Serve calls running."""
        details = self.dashboard("/api/serve/applications/") or {}
        deployments = details.get("applications", {}).get("serve_app", {}).get("deployments", {})
        replicas = deployments.get("ModelServer", {}).get("replicas", [])
        return sorted(replica["node_ip"] for replica in replicas if replica["state"] == "RUNNING")

    def node_of_b(self) -> str | None:
        """Ray's id of the second host; None while it is not part of the cluster."""
        found = self.dashboard("/nodes?view=summary") or {}
        for node in found.get("data", {}).get("summary", []):
            if node.get("ip") == self.b.address and node.get("raylet", {}).get("state") == "ALIVE":
                return str(node["raylet"]["nodeId"])
        return None

    def drain_b(self) -> None:
        """What a cloud does that takes the second host back. Raises `RuntimeError`."""
        asked = [
            f"--address={self.a.address}:6379",
            f"--node-id={self.node_of_b()}",
            "--reason=DRAIN_NODE_REASON_PREEMPTION",
            "--reason-message=taken back",
            f"--deadline-remaining-seconds={DRAIN_NOTICE_S}",
        ]
        done = self.a.run([sys.executable, "-m", "ray.scripts.scripts", "drain-node", *asked])
        if done.returncode:
            raise RuntimeError(f"ray drain-node: {done.stderr[-400:]}")

    def dashboard(self, path: str) -> Any:
        """What Ray's dashboard, on the first host's 127.0.0.1, answers; None: nothing yet."""
        header = f"Authorization: Bearer {self._token}"
        done = self.a.run(["curl", "-sf", "-m", "10", "-H", header, f"http://127.0.0.1:8265{path}"])
        with contextlib.suppress(ValueError):
            return json.loads(done.stdout)
        return None

    def channels(self) -> int:
        """Connections from the ingress to processes of model replicas on the second host."""
        listening = self.b.run(["ss", "-tlnpH"]).stdout.splitlines()
        connected = self.a.run(["ss", "-tnpH", "state", "established", "dst", self.b.address]).stdout.splitlines()
        ports = {
            found[1] for line in listening if _is_of(line, "ModelServer") and (found := re.search(r":(\d+) ", line))
        }
        ours = [line for line in connected if _is_of(line, "Ingress")]
        return sum(any(f"{self.b.address}:{port} " in line for port in ports) for line in ours)

    def stop(self) -> None:
        """End everything, the service first."""
        self.a.set_link(up=True)
        self.b.set_link(up=True)
        self.b.stop()
        self.a.stop()


def _is_of(line: str, deployment: str) -> bool:
    """Whether a line of `ss -p` is about a replica of this deployment."""
    with contextlib.suppress(OSError):
        return any(
            f":{deployment}" in Path(f"/proc/{pid}/cmdline").read_text() for pid in re.findall(r"pid=(\d+)", line)
        )
    return False


def until(holds: Callable[[], bool], what: str, timeout_s: float = START_TIMEOUT_S) -> None:
    """Return when it holds. Raises `RuntimeError` when it does not in time."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        with contextlib.suppress(httpx.HTTPError):
            if holds():
                return
        time.sleep(0.5)
    raise RuntimeError(f"{what}: not there after {timeout_s:g} s")


@dataclass(slots=True)
class Phase:
    """What one fault did."""

    name: str
    streams: int = 0
    identical: int = 0
    moved: int = 0
    """Streams that went on at another replica."""
    longest_pause_s: float = 0.0
    """That a client saw between two events, or before the first."""
    back_s: float | None = None
    """From the fault until a model replica ran on each host again."""
    wrong: list[str] = field(default_factory=list)


async def phase(
    name: str, hosts: TwoHosts, http: httpx.AsyncClient, asked: list[Question], references: list[Answer],
    fault: Callable[[], Awaitable[None]], *, door: Host, seed: int,
) -> Phase:  # fmt: skip
    """Ask every question once, at the proxy of one host, with the fault in the middle."""
    url, grpc_target = f"http://{door.address}:{PUBLIC_PORTS[0]}", f"{door.address}:{PUBLIC_PORTS[1]}"
    places = asyncio.Semaphore(IN_FLIGHT)
    began_s = time.monotonic()

    async def one(visit: Visit) -> Outcome:
        await asyncio.sleep(max(0.0, began_s + visit.at_s - time.monotonic()))
        async with places:
            return await ChaosClient(http, url, asked[visit.question], visit, grpc_target).play()

    async def hit() -> None:
        await asyncio.sleep(max(0.0, began_s + FAULT_AT_S - time.monotonic()))
        await fault()

    # Each phase has numbers of its own: the ingress logs requests by what clients call them.
    coming = [
        replace(visit, number=1000 * seed + visit.number) for visit in visits(seed, len(asked), ARRIVALS_S, asked)
    ]
    hitting = asyncio.create_task(hit())
    outcomes = await asyncio.gather(*(one(visit) for visit in coming))
    await hitting
    moves = moved_requests(hosts.logs)
    judged = [judged_against(outcome, asked, references, moves, batch_invariant=True) for outcome in outcomes]
    return _summed(name, judged)


def _summed(name: str, judged: list[Judged]) -> Phase:
    found = Phase(name, len(judged))
    found.identical = sum(one.verdict is Verdict.IDENTICAL for one in judged)
    found.moved = sum(one.moved for one in judged)
    gaps = [
        after - before for one in judged for before, after in pairwise([one.outcome.began_s, *one.outcome.arrivals_s])
    ]
    found.longest_pause_s = round(max(gaps, default=0.0), 2)
    found.wrong = [
        f"{one.kind}, {one.outcome.visit.mode}: {one.verdict}: {one.reason[:300]}"
        for one in judged
        if one.verdict is not Verdict.IDENTICAL
    ]
    return found


async def run(hosts: TwoHosts, count: int, seed: int) -> list[Phase]:
    """All phases, one after the other."""
    asked = questions(seed, count)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(limits=limits, timeout=TIMEOUT, trust_env=False) as http:
        references = await undisturbed(http, hosts, asked)
        if not (channels := hosts.channels()):
            raise RuntimeError("no token channel leads from the ingress to the other host")
        print(f"{len(asked)} undisturbed answers; token channels to the other host: {channels}", flush=True)
        phases = []

        async def slow() -> None:
            hosts.b.set_slow(SLOW_RATE)
            await asyncio.sleep(SLOW_S)
            hosts.b.set_slow(None)

        async def short_cut() -> None:
            hosts.b.set_link(up=False)
            await asyncio.sleep(SHORT_CUT_S)
            hosts.b.set_link(up=True)

        async def cut() -> None:
            hosts.b.set_link(up=False)

        async def drain() -> None:
            await asyncio.to_thread(hosts.drain_b)

        async def lose() -> None:
            await asyncio.to_thread(hosts.b.stop)

        async def nothing() -> None:
            pass

        for number, (name, fault, door) in enumerate(
            (
                ("none", nothing, hosts.a),
                ("none, asked at the other host's proxy", nothing, hosts.b),
                (f"link slow: {SLOW_RATE} for {SLOW_S:g} s", slow, hosts.a),
                (f"link cut for {SHORT_CUT_S:g} s", short_cut, hosts.a),
                ("link cut, host lost, and back", cut, hosts.a),
                ("host drained, and back", drain, hosts.a),
                ("every process of the host killed, and back", lose, hosts.a),
            )
        ):
            began_s = time.monotonic()
            found = await phase(name, hosts, http, asked, references, fault, door=door, seed=seed + number)
            if fault in (cut, drain, lose):
                await asyncio.to_thread(_back, hosts)
            else:
                await asyncio.to_thread(hosts.until_whole)
            if fault in (cut, drain, lose) and not found.moved:
                found.wrong.append("not put to the test: no stream had to go on at another replica")
            found.back_s = round(time.monotonic() - began_s - FAULT_AT_S, 1)
            phases.append(found)
            print(json.dumps(asdict(found)), flush=True)
        return phases


def _back(hosts: TwoHosts) -> None:
    """The second host comes back: its cable is in, whatever was left of it is gone, and Ray starts anew."""
    hosts.b.set_link(up=True)
    hosts.b.stop()
    until(lambda: hosts.node_of_b() is None, "the cluster's notice that the second host is gone")
    hosts.join_b()
    hosts.until_whole()


def strangers(hosts: TwoHosts) -> list[str]:
    """What somebody on the network without the token can reach: ports that the firewall should have closed, and a
    cluster that lets them in although they stand on one of its hosts."""
    found = []
    for host in (hosts.a, hosts.b):
        listening = host.run(["ss", "-tlnH"]).stdout
        ports = {int(port) for port in re.findall(r"\s(?:\*|0\.0\.0\.0|\[::\]|10\.77\.0\.\d):(\d+)\s", listening)}
        opened = sorted(port for port in ports if _accepts(host.address, port))
        found += [f"{host.address}:{port} is open to all" for port in opened if port not in PUBLIC_PORTS]
        found += [f"{host.address}:{port} does not answer" for port in PUBLIC_PORTS if port not in opened]
        print(f"{host.name}: {len(ports)} ports listen beyond 127.0.0.1; open to a stranger: {opened}", flush=True)
    call = f"import ray; ray.init('{hosts.a.address}:6379', log_to_driver=False); assert len(ray.nodes()) == 2"
    for who, environment in (
        ("no", {"RAY_AUTH_TOKEN": "", "RAY_AUTH_MODE": "disabled"}),
        ("a wrong", {"RAY_AUTH_TOKEN": secrets.token_hex(32)}),
        ("the right", {}),
    ):
        done = hosts.b.run([sys.executable, "-c", call], 120, HOME="/tmp", **environment)
        print(f"somebody with {who} token: {(done.stderr.strip().splitlines() or ['is let in'])[-1]}", flush=True)
        if (done.returncode == 0) != (who == "the right"):
            found.append(f"Ray {'let in' if done.returncode == 0 else 'refused'} somebody with {who} token")
    return found


def _accepts(address: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.3)
        return probe.connect_ex((address, port)) == 0


def table(phases: list[Phase]) -> str:
    """Markdown."""
    lines = [
        "| fault | streams | identical | continued elsewhere | longest pause | whole again after |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {one.name} | {one.streams} | {one.identical} | {one.moved} | {one.longest_pause_s:.1f} s | {one.back_s} s |"
        for one in phases
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefix", required=True, help="of the namespaces (two_hosts.sh gives it)")
    parser.add_argument("--streams", type=int, default=24, help="in each phase")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("loadtest/results/two_hosts.json"))
    arguments = parser.parse_args()
    if missing := missing_programs():
        print(f"skipped: this machine has no {', '.join(missing)}")
        return 0
    folder = Path(tempfile.mkdtemp(prefix="two-hosts-", dir="/var/tmp"))
    hosts = TwoHosts(arguments.prefix, folder)
    try:
        began_s = time.monotonic()
        hosts.start()
        print(f"whole after {time.monotonic() - began_s:.0f} s", flush=True)
        intruders = strangers(hosts)
        phases = asyncio.run(run(hosts, arguments.streams, arguments.seed))
    finally:
        hosts.stop()
        for host in (hosts.a, hosts.b):
            for log in host.folder.glob("*.log"):
                arguments.output.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(log, arguments.output.with_name(f"two_hosts-{host.name}-{log.name}"))
        if hosts.logs.exists():
            shutil.copytree(hosts.logs / "serve", arguments.output.with_suffix(""), dirs_exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
    print(f"\n{table(phases)}\n")
    arguments.output.write_text(
        json.dumps({"phases": [asdict(one) for one in phases], "intruders": intruders}, indent=1)
    )
    wrong = [f"{one.name}: {why}" for one in phases for why in one.wrong] + intruders
    for line in wrong[:20]:
        print(line)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
