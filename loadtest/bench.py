"""How fast are the engine and the service, against transformers' own `generate` and the loop this project grew from?

`python -m loadtest.bench` (or `make bench`). Contenders take turns within each round, so that a drift of the machine
meets all of them; a figure is the median of the rounds, and the ratios are what counts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from loadtest.http_load import drive, wait_until_ready
from loadtest.prompts import chats
from loadtest.service import free_port
from serve_app.models.cache import cache_directory
from serve_app.models.demo import ensure_demo_model

CONCURRENCY = (1, 8, 32)
PREFILL_TOKENS = 900
SEED_TOKENS = 16
"""The seed's loop slows with each token; this many of them flatter it."""


class Worker:
    """A contender's process. It waits on its standard input while it isn't its turn."""

    def __init__(self, kind: str, threads: int, checkout: Path | None = None) -> None:
        """`checkout`: another checkout of this project, whose code it runs."""
        command = [sys.executable, "-m", "loadtest.worker", kind, "--threads", str(threads)]
        environment = os.environ if checkout is None else os.environ | {"PYTHONPATH": str(checkout)}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=checkout, env=environment
        )
        self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a contender ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def run(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "new_tokens": new_tokens}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@contextmanager
def service(config: str) -> Iterator[str]:
    """`serve-app serve CONFIG` on a free port, ready; its URL. Its output goes to a log beside the results."""
    port = free_port()
    log = Path("loadtest/results/service.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "serve_app.cli.main", "serve", config, "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_until_ready(f"http://127.0.0.1:{port}", 300, lambda: process.poll() is None)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=120)


def rate(outcomes: list[dict[str, Any]]) -> float:
    """Median tokens per second."""
    return statistics.median(outcome["tokens"] / outcome["seconds"] for outcome in outcomes)


def measure(rounds: int, new_tokens: int, threads: int, config: str | None) -> dict[str, list[dict[str, Any]]]:
    """All rounds of all contenders, `{contender@concurrency: outcomes}`."""
    prompts = chats(ensure_demo_model(cache_directory(), progress=lambda stage: None), max(CONCURRENCY))
    results: dict[str, list[dict[str, Any]]] = {}

    def note(name: str, outcome: dict[str, Any]) -> None:
        results.setdefault(name, []).append(outcome)
        print(f"{name:<14} {outcome['tokens'] / outcome['seconds']:7.1f} tok/s", flush=True)

    workers = {kind: Worker(kind, threads) for kind in ("generate", "seed", "engine")}
    for worker in workers.values():
        worker.run(prompts[:1], 4)
    for _ in range(rounds):
        note("generate@1", workers["generate"].run(prompts[:2], new_tokens))
        note("seed@1", workers["seed"].run(prompts[:1], SEED_TOKENS))
        for count in CONCURRENCY:
            note(f"engine@{count}", workers["engine"].run(prompts[:count], new_tokens))
    for kind in ("generate", "seed"):
        workers[kind].close()
    if config is not None:
        with service(config) as url:
            model = json.loads(_get(f"{url}/v1/models"))["data"][0]["id"]
            asyncio.run(drive(url, model, prompts[:2], 4))
            for _ in range(rounds):
                for count in CONCURRENCY:
                    note(f"beside@{count}", workers["engine"].run(prompts[:count], new_tokens))
                    cpu = time.process_time()
                    outcome = asyncio.run(drive(url, model, prompts[:count], new_tokens))
                    note(f"service@{count}", outcome | {"client_cpu_s": time.process_time() - cpu})
    workers["engine"].close()
    return results


def compare(rounds: int, new_tokens: int, threads: int, checkout: Path) -> dict[str, list[dict[str, Any]]]:
    """This engine and another checkout's, in turns; `prefill` is a long prompt and one new token."""
    prompts = chats(ensure_demo_model(cache_directory(), progress=lambda stage: None), max(CONCURRENCY))
    results: dict[str, list[dict[str, Any]]] = {}
    workers = {"other": Worker("engine", threads, checkout), "engine": Worker("engine", threads)}
    for worker in workers.values():
        worker.run(prompts[:1], 4)
    for turn in range(rounds):
        for count in CONCURRENCY:
            for kind, worker in workers.items():
                results.setdefault(f"{kind}@{count}", []).append(worker.run(prompts[:count], new_tokens))
        for kind, worker in workers.items():
            long = [[turn + 1, *chain.from_iterable(prompts)][:PREFILL_TOKENS]]
            outcome = worker.run(long, 1) | {"tokens": len(long[0])}
            results.setdefault(f"{kind}@prefill", []).append(outcome)
    for worker in workers.values():
        worker.close()
    for count in (*CONCURRENCY, "prefill"):
        other, own = rate(results[f"other@{count}"]), rate(results[f"engine@{count}"])
        print(f"{count!s:>8}: {other:7.1f} -> {own:7.1f} tok/s, x {own / other:.2f}")
    return results


def _get(url: str) -> str:
    import httpx

    return httpx.get(url, timeout=10).text


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: a row a contender and concurrency."""
    baseline, seed = rate(results["generate@1"]), rate(results["seed@1"])
    lines = [
        "| contender | concurrency | tok/s | x generate | x seed | of the engine | TTFT p50 | ITL p50 | ITL p99 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, outcomes in results.items():
        contender, count = name.split("@")
        if contender == "beside":
            continue
        of_engine = rate(outcomes) / rate(results[f"beside@{count}"]) if contender == "service" else None
        ttfts = [outcome["ttft_s"][len(outcome["ttft_s"]) // 2] for outcome in outcomes if "ttft_s" in outcome]

        def middle(key: str, outcomes: list[dict[str, Any]] = outcomes) -> str:
            values = [outcome[key] for outcome in outcomes if key in outcome]
            return f"{1000 * statistics.median(values):.0f} ms" if values else ""

        lines.append(
            f"| {contender} | {count} | {rate(outcomes):.1f} | {rate(outcomes) / baseline:.2f} "
            f"| {rate(outcomes) / seed:.1f} | {'' if of_engine is None else f'{of_engine:.0%}'} "
            f"| {f'{1000 * statistics.median(ttfts):.0f} ms' if ttfts else ''} "
            f"| {middle('itl_p50_s')} | {middle('itl_p99_s')} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--config", default="configs/serve.yaml", help="the service to measure")
    parser.add_argument("--engine-only", action="store_true")
    parser.add_argument("--against", type=Path, help="only this engine and that of another checkout, in turns")
    parser.add_argument("--output", type=Path, default=Path("loadtest/results/bench.json"))
    arguments = parser.parse_args()
    if arguments.against is not None:
        compare(arguments.rounds, arguments.new_tokens, arguments.threads, arguments.against)
        return
    config = None if arguments.engine_only else arguments.config
    results = measure(arguments.rounds, arguments.new_tokens, arguments.threads, config)
    text = table(results)
    print(f"\n{text}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    arguments.output.write_text(json.dumps({"machine": machine, "results": results, "table": text}, indent=1))
    print(f"\nwritten to {arguments.output}")


if __name__ == "__main__":
    main()
