"""Where does the time go from `serve-app serve` to the first token?

`python -m loadtest.startup`. Starts the service, reads the moments from the logs of Serve's controller and of the model
replica, asks for a token as soon as /ready says 200, and stops it. With `--against` another checkout takes turns.
The first start on a machine also fetches the model and compiles the kernels: start once before.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from loadtest.local_service import LocalService
from loadtest.service import free_port

ROOT = Path(__file__).parents[1]
READY, TOKEN = "ready", "token"
MILESTONES: tuple[tuple[str, str, str], ...] = (
    # (what ends here, where it is seen, the pattern of what is written there)
    ("`serve-app`: imports, config, port, model found", "process", "ray.serve.scripts"),
    ("`serve run`: imports", "session", ""),
    ("Ray", "controller", "Controller starting"),
    ("Serve's proxy, and `build` in a process of its own", "controller", r"Adding \d+ replicas? to .*'ModelServer'"),
    ("a process for the replica, Ray Serve's imports", "model", "starting torch"),
    ("torch, transformers; config and files", "model", "loading weights"),
    ("weights mapped (quantised, if asked for)", "model", "fingerprinting weights"),
    ("fingerprint", "model", "preparing the kernels"),
    ("weights packed and checked, the model tried", "model", "checking attention"),
    ("attention checked", "model", "allocating the KV cache"),
    ("KV cache allocated", "model", "checking the model"),
    (
        "model checked, exactness checked, known to Serve",
        "controller",
        r"deployment='ModelServer'.* started successfully",
    ),
    ("known to the ingress: /ready says 200", READY, ""),
    ("first token of a first request", TOKEN, ""),
)
REPLICA = re.compile(r"ray::ServeReplica:[^:]*:(\w+)")
_LINE = re.compile(r"^[A-Z]+ (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) (.*)$")
_SESSION = re.compile(r"session_(\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_\d{6})")
_LOGS = {"controller": "controller_*.log", "model": "replica_*ModelServer*.log"}


def log_moments(text: str) -> list[tuple[float, str]]:
    """(seconds since the epoch, rest of the line) of each line of a Serve log that bears a time."""
    found = (_LINE.match(line) for line in text.splitlines())
    return [(datetime.strptime(match[1], "%Y-%m-%d %H:%M:%S,%f").timestamp(), match[2]) for match in found if match]


def session_moment(folder: str) -> float:
    """When Ray named this session folder, in seconds since the epoch. Raises ValueError for another name."""
    match = _SESSION.match(folder)
    if match is None:
        raise ValueError(f"{folder} is no session of Ray's")
    return datetime.strptime(match[1], "%Y-%m-%d_%H-%M-%S_%f").timestamp()


def find_moments(logs: Mapping[str, Sequence[tuple[float, str]]], known: Mapping[str, float]) -> dict[str, float]:
    """When each milestone was reached, first time; those that can't be found are left out.

    `logs`: lines by place; `known`: moments of the places that have no log.
    """
    moments: dict[str, float] = {}
    for name, place, wanted in MILESTONES:
        if place in known:
            moments[name] = known[place]
        for moment, line in logs.get(place, ()):
            if re.search(wanted, line):
                moments[name] = moment
                break
    return moments


def durations(moments: Mapping[str, float], started_at: float) -> dict[str, float]:
    """Seconds from each milestone's predecessor to it. One that was not found counts with the next that was."""
    before, found = started_at, {}
    for name, _, _ in MILESTONES:
        if name in moments:
            found[name] = moments[name] - before
            before = moments[name]
    return found


def _child_moment(service: LocalService, title: str) -> float | None:
    """When a child with this in its command line was made. A process's own time counts from a rounded boot time."""
    assert service.process is not None
    offset = service.started_at - service.process.create_time()
    for child in service.process.children():
        try:
            if title in " ".join(child.cmdline()):
                return child.create_time() + offset
        except psutil.NoSuchProcess:
            continue
    return None


def replica_memory(family: Sequence[psutil.Process]) -> list[tuple[str, dict[str, float]]]:
    """(deployment, MB) of each replica: resident, what it shares counted in part (pss), its own alone (uss)."""
    found = []
    for process in family:
        try:
            command = process.cmdline()
            if not command or not (match := REPLICA.match(command[0])):
                continue
            memory = process.memory_full_info()
        except psutil.NoSuchProcess:  # one of Ray's helpers that has just ended
            continue
        found.append((match[1], {name: getattr(memory, name, 0) / 1e6 for name in ("rss", "pss", "uss")}))
    return sorted(found, key=lambda replica: replica[0])


def start_once(
    tree: Path, config: Path, settings: Mapping[str, Any], log: Path
) -> tuple[dict[str, float], list[tuple[str, dict[str, float]]]]:
    """Start, ask for one token, stop; seconds by milestone, and the replicas' memory. Raises `RuntimeError`."""
    port = free_port()
    derived = log.with_suffix(".yaml")
    derived.parent.mkdir(parents=True, exist_ok=True)
    data = yaml.safe_load(config.read_text(encoding="utf-8"))
    data["applications"][0]["args"].update(settings)
    derived.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", "serve_app.cli.main", "serve", str(derived.resolve()), "--port", str(port)]
    with LocalService(command, port, log, {"PYTHONPATH": str(tree)}) as service:
        ready = service.until_answers("/ready")
        body = {"prompt": "Once upon a time", "max_tokens": 1, "temperature": 0}
        httpx.post(f"{service.url}/stream", json=body, timeout=60, trust_env=False).raise_for_status()
        token = datetime.now().timestamp()
        known = {READY: ready, TOKEN: token}
        memory = replica_memory(service.family())
        if (child := _child_moment(service, "ray.serve.scripts")) is not None:
            known["process"] = child
        session = service.session
        logs: dict[str, list[tuple[float, str]]] = {}
        if session is not None:
            known["session"] = session_moment(session.name)
            for place, pattern in _LOGS.items():
                paths = sorted((session / "logs" / "serve").glob(pattern))
                logs[place] = sorted(line for path in paths for line in log_moments(path.read_text(errors="replace")))
        return durations(find_moments(logs, known), service.started_at), memory


def table(results: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Markdown: a row a milestone, a column a checkout; medians of the rounds in seconds."""
    names = [name for name, runs in results.items() if runs]
    lines = [f"| until | {' | '.join(f'{name}, s' for name in names)} |", "|---" * (1 + len(names)) + "|"]
    for milestone, _, _ in MILESTONES:
        cells = []
        for name in names:
            values = [run[milestone] for run in results[name] if milestone in run]
            cells.append(f"{statistics.median(values):.2f}" if values else "")
        lines.append(f"| {milestone} | {' | '.join(cells)} |")
    totals = {name: [sum(run.values()) for run in results[name]] for name in names}
    lines.append(f"| **the whole** | {' | '.join(f'**{statistics.median(totals[name]):.2f}**' for name in names)} |")
    return "\n".join(lines)


def memory_table(memory: Mapping[str, Sequence[tuple[str, Mapping[str, float]]]]) -> str:
    """Markdown: a row a replica of the last start of each checkout, after its first token."""
    lines = ["| replica, MB | resident | shared counted in part | its own alone |", "|---|---|---|---|"]
    for name, replicas in memory.items():
        for deployment, replica in replicas:
            cells = (f"{replica[kind]:.0f}" for kind in ("rss", "pss", "uss"))
            lines.append(f"| {name}, {deployment} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=ROOT / "configs/serve.yaml")
    parser.add_argument("--set", type=json.loads, default={}, metavar="JSON", help="sections of args to replace")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", type=Path, help="another checkout, started in turns with this one")
    parser.add_argument("--output", type=Path, default=Path("loadtest/results/startup.json"))
    arguments = parser.parse_args()
    trees = {"this checkout": ROOT}
    if arguments.against is not None:
        trees = {"the other": arguments.against.resolve(), **trees}
    results: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
    memory: dict[str, list[tuple[str, dict[str, float]]]] = {}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for number in range(arguments.rounds):
        for name, tree in trees.items():
            log = arguments.output.with_name(f"startup-{name.replace(' ', '-')}.log")
            run, memory[name] = start_once(tree, arguments.config, arguments.set, log)
            results[name].append(run)
            print(f"round {number + 1}, {name}: {sum(run.values()):.2f} s", flush=True)
            text = f"{table(results)}\n\n{memory_table(memory)}"
            arguments.output.write_text(json.dumps({"results": results, "memory": memory, "table": text}, indent=1))
    print(f"\n{text}\n\nwritten to {arguments.output}")


if __name__ == "__main__":
    main()
