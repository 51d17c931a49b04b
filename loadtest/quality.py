"""What does holding the weights in fewer bits cost in quality, and what does it save or cost in memory and speed?

`python -m loadtest.quality`. Every kind of `model.quantization` reads the same text, each next token predicted from the
true ones before it, and answers the same chats through the engine; kinds take turns within each round, so that a drift
of the machine meets all of them. Perplexity is exp of the mean -log p; agreement is how often the most likely next
token is the one that the unquantised model calls most likely.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from serve_app.config import ModelConfig

KINDS: tuple[str, ...] = get_args(ModelConfig.model_fields["quantization"].annotation)
BASE = "none"
TEXT = Path(__file__).with_name("quality.txt")
"""A story written for this purpose, in no model's training data."""
STREAMS = (1, 8)


class Worker:
    """One kind's process. It waits on its standard input while it isn't its turn."""

    def __init__(self, source: str, kind: str, device: str, threads: int) -> None:
        command = [sys.executable, "-m", "loadtest.quality_worker", source, kind]
        command += ["--device", device, "--threads", str(threads)]
        self._kind = kind
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._kind} ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def do(self, what: str, **arguments: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def perplexity(surprise_nats: float, predictions: int) -> float:
    """exp of the mean -log p of a next token."""
    return math.exp(surprise_nats / predictions)


def agreement(top: Sequence[int], base: Sequence[int]) -> float:
    """Share of positions at which both call the same token most likely. Raises ValueError if they are not as many."""
    return sum(one == other for one, other in zip(top, base, strict=True)) / len(base)


def measure(
    source: str, device: str, kinds: Sequence[str], text: str, rounds: int, new_tokens: int, threads: int
) -> dict[str, dict[str, Any]]:
    """`{kind: its score, its memory and its tokens per second in each round}`."""
    results: dict[str, dict[str, Any]] = {}
    workers: dict[str, Worker] = {}
    for kind in kinds:
        scorer = Worker(source, kind, device, threads)
        results[kind] = scorer.do("score", text=text) | {"tokens_per_s": {count: [] for count in STREAMS}}
        scorer.close()  # its memory is that of the text's logits, not of serving
        print(f"{kind}: perplexity {_perplexity(results[kind]):.3f}", flush=True)
        workers[kind] = Worker(source, kind, device, threads)
        for count in STREAMS:  # the first run is slower
            workers[kind].do("generate", streams=count, new_tokens=4)
        results[kind] |= workers[kind].do("memory")
    for _ in range(rounds):
        for count in STREAMS:
            for kind, worker in workers.items():
                outcome = worker.do("generate", streams=count, new_tokens=new_tokens)
                results[kind]["tokens_per_s"][count].append(outcome["tokens"] / outcome["seconds"])
                print(f"{kind} @ {count}: {outcome['tokens'] / outcome['seconds']:.1f} tok/s", flush=True)
    for worker in workers.values():
        worker.close()
    return results


def _perplexity(result: dict[str, Any]) -> float:
    return perplexity(result["surprise_nats"], len(result["top"]))


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row a kind, beside the unquantised model."""
    base = results[BASE]
    lines = [
        "| quantization | perplexity | x none | same top token | weights, MB | predicted | process grew* | "
        + " | ".join(f"tok/s at {count} | x none" for count in STREAMS)
        + " |",
        "|" + "---|" * (7 + 2 * len(STREAMS)),
    ]
    for kind, result in results.items():
        grown = result["grown_bytes"]
        cells = [
            kind,
            f"{_perplexity(result):.3f}",
            f"{_perplexity(result) / _perplexity(base):.4f}",
            f"{agreement(result['top'], base['top']):.1%}",
            f"{result['held_bytes'] / 1e6:.0f}",
            f"{result['predicted_bytes'] / 1e6:.0f}",
            "" if grown is None else f"{grown / 1e6:.0f}",
        ]
        for count in STREAMS:
            rate = statistics.median(result["tokens_per_s"][count])
            cells += [f"{rate:.1f}", f"{rate / statistics.median(base['tokens_per_s'][count]):.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", "*: since before the weights, less the KV cache; MB"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", default="demo", help="as model.source in a config")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path, default=Path("loadtest/results/quality.json"))
    arguments = parser.parse_args()
    kinds = [BASE, *(kind for kind in arguments.kinds if kind != BASE)]
    results = measure(
        arguments.source,
        arguments.device,
        kinds,
        arguments.text.read_text(encoding="utf-8"),
        arguments.rounds,
        arguments.new_tokens,
        arguments.threads,
    )
    text = f"{len(results[BASE]['top'])} predictions, {arguments.rounds} rounds\n\n{table(results)}"
    print(f"\n{text}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    arguments.output.write_text(json.dumps({"machine": machine, "results": results, "table": text}, indent=1))
    print(f"\nwritten to {arguments.output}")


if __name__ == "__main__":
    main()
