"""A host of a Ray cluster in a network namespace: its processes, its link to the switch and its firewall.

`loadtest/two_hosts.sh` makes the namespaces. Promises that each host has folders of its own and sees only its own
`127.0.0.1`, and that whatever was started is ended. Needs root.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

RAY_PORTS = {
    "--node-manager-port": 6380,
    "--object-manager-port": 6381,
    "--runtime-env-agent-port": 6382,
    "--dashboard-agent-grpc-port": 6383,
    "--dashboard-agent-listen-port": 6384,
    "--metrics-export-port": 6385,
    "--min-worker-port": 10002,
    "--max-worker-port": 10199,
}
"""What `ray start` is told on every host, so that a firewall can know it."""
GCS_PORT = 6379
EPHEMERAL = (30000, 30999)
"""From these the system gives ports to Serve's replicas and to token channels (`net.ipv4.ip_local_port_range`)."""
BEHIND_HAPROXY = ((20000, 20999), (40000, 40999))
"""Of ingress replicas: HAProxy on any host reaches them."""
BETWEEN_HOSTS = (
    str(GCS_PORT),
    "6380-6385",
    "10002-10199",
    *(f"{low}-{high}" for low, high in (EPHEMERAL, *BEHIND_HAPROXY)),
)
"""What hosts of the cluster open to each other, as nft writes it."""
_STOP_S = 20.0


class Host:
    """One namespace."""

    def __init__(self, prefix: str, name: str, address: str, folder: Path, environment: Mapping[str, str]) -> None:
        """`folder`: of this host alone, it becomes its `/tmp`. `environment`: beside that of this process."""
        self.name = name
        self.address = address
        self.folder = folder / name
        self.folder.mkdir(mode=0o700)
        self._namespace = f"{prefix}-{name}"
        self._switch = f"{prefix}-net"
        self._environment = os.environ | environment
        self._processes: list[subprocess.Popen[bytes]] = []

    def command(self, words: Sequence[str]) -> list[str]:
        """`words`, to be run on this host."""
        own_tmp = 'mount --bind "$0" /tmp && exec "$@"'
        return ["ip", "netns", "exec", self._namespace, "sh", "-c", own_tmp, str(self.folder), *words]

    def start(self, words: Sequence[str], log: str) -> subprocess.Popen[bytes]:
        """A process of this host that `stop` ends; what it prints goes to a file `log`."""
        with (self.folder / log).open("ab") as output:
            process = subprocess.Popen(
                self.command(words),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def run(
        self, words: Sequence[str], timeout_s: float = 60.0, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run to the end. Raises `subprocess.TimeoutExpired`."""
        return subprocess.run(
            self.command(words),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            env=self._environment | environment,
        )

    def start_ray(self, head: str | None, resources: str) -> subprocess.Popen[bytes]:
        """`ray start` in the foreground. `head`: the address of the first host; None: this is it."""
        where = [f"--address={head}:{GCS_PORT}"] if head else ["--head", f"--port={GCS_PORT}", "--dashboard-port=8265"]
        ports = [f"{option}={port}" for option, port in RAY_PORTS.items()]
        own = [f"--node-ip-address={self.address}", "--num-cpus=4", "--num-gpus=0", f"--resources={resources}"]
        store = "--object-store-memory=100000000"
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", *where, *own, store, *ports]
        self.run(["sysctl", "-qw", f"net.ipv4.ip_local_port_range={EPHEMERAL[0]} {EPHEMERAL[1]}"])
        return self.start([*ray, "--disable-usage-stats", "--block"], "ray.log")

    def set_link(self, *, up: bool) -> None:
        """Plug this host's cable in, or pull it out."""
        self._on_switch("ip", "link", "set", f"port-{self.name}", "up" if up else "down")

    def set_slow(self, rate: str | None) -> None:
        """Let packets to and from this host through at this rate (`tc`'s), with half a second of queue; None: again as
        fast as the machine allows."""
        if rate is None:
            self._on_switch("tc", "qdisc", "del", "dev", f"port-{self.name}", "root")
            self.run(["tc", "qdisc", "del", "dev", "eth0", "root"])
            return
        shape = ["root", "tbf", "rate", rate, "burst", "16kb", "latency", "500ms"]
        self._on_switch("tc", "qdisc", "replace", "dev", f"port-{self.name}", *shape)
        self.run(["tc", "qdisc", "replace", "dev", "eth0", *shape]).check_returncode()

    def set_firewall(self, peers: Sequence[str], public: Sequence[int]) -> None:
        """Refuse all that comes in but answers, `BETWEEN_HOSTS` from `peers`, and `public` from everywhere."""
        rules = f"""
            table inet firewall {{
              chain input {{
                type filter hook input priority 0; policy drop;
                iif lo accept
                ct state established,related accept
                icmp type echo-request accept
                ip saddr {{ {", ".join(peers)} }} tcp dport {{ {", ".join(BETWEEN_HOSTS)} }} accept
                tcp dport {{ {", ".join(map(str, public))} }} accept
              }}
            }}"""
        self.run(["nft", rules]).check_returncode()

    def _on_switch(self, *words: str) -> None:
        subprocess.run(["ip", "netns", "exec", self._switch, *words], check=True, capture_output=True)

    def pids(self) -> list[int]:
        """All processes of this host."""
        listed = subprocess.run(["ip", "netns", "pids", self._namespace], capture_output=True, text=True, check=True)
        return [int(pid) for pid in listed.stdout.split()]

    def stop(self) -> None:
        """End everything that runs on this host."""
        for number, patience_s in ((signal.SIGTERM, _STOP_S), (signal.SIGKILL, _STOP_S)):
            for process in self._processes:
                if process.poll() is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, number)
            for process in self._processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(patience_s)
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._processes.clear()


def missing_programs() -> list[str]:
    """What a run needs and this machine lacks."""
    return [program for program in ("ip", "tc", "nft", "curl", "mount", "sysctl") if shutil.which(program) is None]
