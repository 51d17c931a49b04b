"""What does it cost to bring a token from the engine to the client? CPU of each process, by streamed token.

`python -m loadtest.streaming_path` serves with the real model server, ingress and proxy over an engine that computes
nothing (`loadtest.paced_app`), since a token's way must be measured while readers are paced: what comes in bursts is
joined, and costs a thirtieth. `RAY_SERVE_ENABLE_HA_PROXY=0` measures Serve's Python proxy.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import yaml

from loadtest.http_load import percentile, wait_until_ready
from loadtest.interrupts import heed_ctrl_c
from loadtest.paced_app import RATE_VARIABLE
from loadtest.protocol_load import PROTOCOLS, drive
from loadtest.service import GRPC_SERVICES, derive_config, free_port
from serve_app.cli.environment import server_environment
from serve_app.cli.haproxy import haproxy_environment
from serve_app.cli.serve import SERVE_RUN

STREAMS = (1, 8, 32)
RATE = 10.0
TOKENS = 100
KINDS = {
    "ray::ServeReplica:serve_app:ModelServer": "model server",
    "ray::ServeReplica:serve_app:Ingress": "ingress",
    "ray::ProxyActor": "proxy",
    "ray::ServeController": "Serve's controller",
}
"""Beginnings of process titles. Whatever else descends from `serve run` is Ray."""
PATH = ("model server", "ingress", "proxy")
"""What a token passes."""


@contextmanager
def paced_service(config: Path, rate: float) -> Iterator[tuple[str, str, psutil.Process]]:
    """Its URL, `host:port` of its gRPC, and the process of `serve run`."""
    port, grpc_port = free_port(), free_port()
    data = yaml.safe_load(config.read_text())
    data["http_options"] = {**(data.get("http_options") or {}), "host": "127.0.0.1", "port": port}
    data["grpc_options"] = {"port": grpc_port, "grpc_servicer_functions": [GRPC_SERVICES]}
    data["applications"][0] = derive_config(data["applications"][0], {"import_path": "loadtest.paced_app:build"})
    environment = server_environment(os.environ) | {RATE_VARIABLE: str(rate)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path.cwd()), environment.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory() as folder:
        environment |= haproxy_environment(environment, Path(folder) / "haproxy", Path(folder))
        path = Path(folder) / "paced.yaml"
        path.write_text(yaml.safe_dump(data, sort_keys=False))
        log = Path("loadtest/results/streaming_path.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as output:
            process = psutil.Popen(
                [*SERVE_RUN, str(path)],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                preexec_fn=heed_ctrl_c,
            )
        try:
            wait_until_ready(f"http://127.0.0.1:{port}", 120, process)
            yield f"http://127.0.0.1:{port}", f"127.0.0.1:{grpc_port}", process
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=60)


def cpu_seconds(service: psutil.Process) -> Counter[str]:
    """CPU that the service's processes have used, by kind."""
    used: Counter[str] = Counter()
    for process in service.children(recursive=True):
        try:
            name, title, times = process.name(), " ".join(process.cmdline()), process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        kind = next((kind for beginning, kind in KINDS.items() if title.startswith(beginning)), "Ray")
        kind = "proxy" if name == "haproxy" else kind
        used[kind] += times.user + times.system
    return used


def measure(
    url: str, grpc_target: str, service: psutil.Process, protocol: str, streams: int, tokens: int
) -> dict[str, Any]:
    """`streams` clients at once, each reading `tokens` tokens as they come."""
    before, own_before, began = cpu_seconds(service), time.process_time(), time.monotonic()
    outcome = asyncio.run(drive(url, grpc_target, protocol, streams, tokens))
    used = cpu_seconds(service)
    used.subtract(before)
    delivered = streams * tokens
    return {
        "protocol": protocol,
        "streams": streams,
        "seconds": time.monotonic() - began,
        "ms_per_token": {kind: 1e3 * seconds / delivered for kind, seconds in used.items()},
        "path_ms_per_token": 1e3 * sum(used[kind] for kind in PATH) / delivered,
        "client_ms_per_token": 1e3 * (time.process_time() - own_before) / delivered,
        "ttft_p50_s": percentile(outcome["ttft_s"], 0.5),
        "itl_p50_s": outcome["itl_p50_s"],
        "itl_p99_s": outcome["itl_p99_s"],
    }


def table(figures: list[dict[str, Any]]) -> str:
    """Markdown."""
    kinds = [*PATH, "Serve's controller", "Ray"]
    rows = [
        f"| CPU ms by token | {' | '.join(kinds)} | **path** | client | gap p50 / p99, ms |",
        "|---|" + "---|" * (len(kinds) + 3),
    ]
    for one in figures:
        cells = " | ".join(f"{one['ms_per_token'].get(kind, 0.0):.2f}" for kind in kinds)
        gaps = f"{1e3 * one['itl_p50_s']:.0f} / {1e3 * one['itl_p99_s']:.0f}"
        rows.append(
            f"| {one['protocol']}, {one['streams']} streams | {cells} | **{one['path_ms_per_token']:.2f}** | "
            f"{one['client_ms_per_token']:.2f} | {gaps} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtest.streaming_path", description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/serve.yaml"))
    parser.add_argument("--rate", type=float, default=RATE, help=f"tokens per second of each stream ({RATE:g})")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"of each stream ({TOKENS})")
    parser.add_argument(
        "--protocol", nargs="+", choices=PROTOCOLS, default=["completions"], help="one or more, in turns (completions)"
    )
    parser.add_argument("--output", type=Path, default=Path("loadtest/results/streaming_path.json"))
    arguments = parser.parse_args()
    with paced_service(arguments.config, arguments.rate) as (url, grpc_target, service):
        for protocol in arguments.protocol:
            measure(url, grpc_target, service, protocol, 2, 20)  # whatever is only done once
        figures = [
            measure(url, grpc_target, service, protocol, streams, arguments.tokens)
            for streams in STREAMS
            for protocol in arguments.protocol
        ]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(figures, indent=1))
    print(table(figures))


if __name__ == "__main__":
    sys.exit(main())
