"""How much CPU does a service take that nobody asks anything, and how much of it is our code?

`python -m loadtest.idle_cpu`. Starts the service and, beside it, an application of Ray Serve with the same replicas and
nothing in them (`loadtest.bare_app`), waits until both are at rest, and reads the CPU time of every process before and
after. What the service takes more than the bare application is ours.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import yaml

from loadtest.local_service import LocalService
from loadtest.service import free_port
from serve_app.cli.environment import server_environment

ROOT = Path(__file__).parents[1]
OURS, BARE = "service", "bare"
ROLES = (
    ("model replica", r"^ray::ServeReplica:.*ModelServer"),
    ("ingress replica", r"^ray::ServeReplica:.*Ingress"),
    ("Serve's controller", r"^ray::ServeController"),
    ("Serve's proxy", r"^ray::ProxyActor"),
    ("`serve run`", r"ray\.serve\.scripts"),
    ("Ray's GCS", r"gcs_server"),
    ("Ray's raylet", r"raylet/raylet "),
    ("Ray's dashboard and agents", r"dashboard|runtime_env|log_monitor|monitor\.py"),
)
OTHER = "other workers of Ray's"
REPLICAS = ("model replica", "ingress replica")


def role_of(command: str) -> str:
    """What a process is, by its command line or title."""
    return next((name for name, pattern in ROLES if re.search(pattern, command)), OTHER)


def cpu_seconds(processes: Iterable[psutil.Process]) -> dict[int, tuple[str, float]]:
    """{pid: (role, CPU seconds so far)}; those that end meanwhile are left out."""
    found = {}
    for process in processes:
        try:
            times = process.cpu_times()
            found[process.pid] = role_of(" ".join(process.cmdline())), times.user + times.system
        except psutil.NoSuchProcess:
            continue
    return found


def shares(
    before: Mapping[int, tuple[str, float]], after: Mapping[int, tuple[str, float]], seconds: float
) -> dict[str, float]:
    """CPU by role, as a share of one core. What began meanwhile counts from 0, what ended is not counted."""
    spent: dict[str, float] = defaultdict(float)
    for pid, (role, now) in after.items():
        spent[role] += (now - before.get(pid, ("", 0.0))[1]) / seconds
    return dict(spent)


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown: a row a role, in percent of a core."""
    lines = ["| % of a core | bare Ray Serve | the service | more |", "|---|---|---|---|"]
    for role in (*(name for name, _ in ROLES), OTHER):
        if any(role in by_role for by_role in found.values()):
            lines.append(_row(role, found[BARE].get(role, 0.0), found[OURS].get(role, 0.0)))
    for title, roles in (("the replicas together", set(REPLICAS)), ("everything", None)):
        bare, ours = (sum(v for k, v in found[name].items() if roles is None or k in roles) for name in (BARE, OURS))
        lines.append(_row(f"**{title}**", bare, ours))
    return "\n".join(lines)


def _row(title: str, bare: float, ours: float) -> str:
    return f"| {title} | {100 * bare:.2f} | {100 * ours:.2f} | {100 * (ours - bare):+.2f} |"


def _service(name: str, config: dict[str, Any], output: Path, tree: Path) -> LocalService:
    port = free_port()
    data = {**config, "http_options": {"host": "127.0.0.1", "port": port}}
    if name == BARE:
        data["applications"] = [{**config["applications"][0], "import_path": "loadtest.bare_app:build"}]
    path = output.with_name(f"idle-{name}.yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", "ray.serve.scripts", "run", str(path.resolve())]
    environment = server_environment(os.environ) | {"PYTHONPATH": str(tree)}
    return LocalService(command, port, output.with_name(f"idle-{name}.log"), environment)


def measure(config: dict[str, Any], output: Path, tree: Path, settle_s: float, seconds: float) -> dict[str, Any]:
    """{service or bare: {role: share of a core}}. Raises `RuntimeError` when one does not start."""
    with ExitStack() as stack:
        places = {BARE: ROOT, OURS: tree}
        services = {name: stack.enter_context(_service(name, config, output, place)) for name, place in places.items()}
        for service in services.values():
            service.until_answers("/ready")
        time.sleep(settle_s)
        start = time.monotonic()
        before = {name: cpu_seconds(service.family()) for name, service in services.items()}
        time.sleep(seconds)
        after = {name: cpu_seconds(service.family()) for name, service in services.items()}
        elapsed = time.monotonic() - start
        return {name: shares(before[name], after[name], elapsed) for name in services}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=ROOT / "configs/serve.yaml")
    parser.add_argument("--tree", type=Path, default=ROOT, help="another checkout whose service is measured")
    parser.add_argument("--settle", type=float, default=30.0, metavar="SECONDS")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--output", type=Path, default=Path("loadtest/results/idle.json"))
    arguments = parser.parse_args()
    config = yaml.safe_load(arguments.config.read_text(encoding="utf-8"))
    found = measure(config, arguments.output, arguments.tree.resolve(), arguments.settle, arguments.seconds)
    text = table(found)
    print(text)
    arguments.output.write_text(json.dumps({"shares": found, "table": text}, indent=1))
    print(f"\nwritten to {arguments.output}")


if __name__ == "__main__":
    main()
