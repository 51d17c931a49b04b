"""What does a schema cost? `python -m loadtest.structured`.

One engine of the demo model makes the same number of tokens with a schema and without one, in turns. The runs are short
and many, and each ratio is the median of those within a round: on a shared machine the speed changes by a third from
one ten seconds to the next. With the masks alone no row of a step is spare, so that nothing is drafted; as served, what
the schema forces is drafted and verified. The first token is measured without a schema, with one that is compiled
already and with one that is new. Last come the times of single masks, after random tokens that the schema allows.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import time
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher

from loadtest.prompts import chats
from serve_app.config import EngineConfig, ModelConfig
from serve_app.core import Failure, Fingerprint, GenerationRequest, SamplingParams
from serve_app.engine.engine import Engine
from serve_app.grammar import Vocabulary, compile_grammar, start_loading
from serve_app.models.cache import cache_directory
from serve_app.models.loader import load
from serve_app.models.source import ModelFiles, resolve

STREAMS = (8, 32)
TARGETS = {8: 0.05, 32: 0.10}
"""Streams -> the share of tok/s that masks may cost."""
FIRST_TOKEN_TARGET_MS = 5.0
KINDS = ("none", "masks", "served")
_RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "color": {"enum": ["red", "green", "blue"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 4},
    },
    "required": ["name", "age", "color", "tags"],
    "additionalProperties": False,
}


def endless(name: str = "people") -> str:
    """A schema that no measured output completes. Another `name` makes another grammar of the same size."""
    records = {"type": "array", "items": _RECORD, "minItems": 10_000}
    schema = {"type": "object", "properties": {name: records}, "required": [name], "additionalProperties": False}
    return LLMatcher.grammar_from_json_schema(schema)


@dataclass(frozen=True, slots=True)
class Run:
    """One measured run."""

    tokens_per_s: float
    cpu_ms_per_token: float
    """Of the whole process: the model's threads and those that compute masks."""
    tokens_per_step: float


class Bench:
    """An engine and prompts for it. It looks inside the engine: how many rows a step may have is no interface."""

    def __init__(self, engine: Engine, fingerprint: Fingerprint, prompts: list[list[int]]) -> None:
        self._engine = engine
        self._fingerprint = fingerprint
        self._prompts = prompts
        self._rows = engine._core.scheduler.max_running

    def run(self, kind: str, streams: int, new_tokens: int) -> Run:
        """All streams at once, each of so many tokens. `kind`: one of `KINDS`."""
        self._engine._core.scheduler.max_running = streams if kind == "masks" else self._rows
        grammar = "" if kind == "none" else endless()
        before, start, cpu = self._engine.stats().counters, time.perf_counter(), time.process_time()
        asyncio.run(self._all(grammar, streams, new_tokens))
        seconds, cpu, after = time.perf_counter() - start, time.process_time() - cpu, self._engine.stats().counters
        tokens, steps = streams * new_tokens, max(1, after.steps - before.steps)
        return Run(tokens / seconds, 1000 * cpu / tokens, (after.output_tokens - before.output_tokens) / steps)

    async def _all(self, grammar: str, streams: int, new_tokens: int) -> None:
        requests = (self._request(number, grammar, new_tokens) for number in range(streams))
        await asyncio.gather(*(self._serve(request) for request in requests))

    def _request(self, number: int, grammar: str, new_tokens: int) -> GenerationRequest:
        prompt = tuple(self._prompts[number % len(self._prompts)])
        sampling = SamplingParams(seed=number, temperature=0.8, top_p=0.95)
        return GenerationRequest("schema", self._fingerprint, prompt, sampling, new_tokens, constraint=grammar)

    async def _serve(self, request: GenerationRequest) -> None:
        async for reply in self._engine.generate(request):
            if isinstance(reply, Failure):
                raise SystemExit(reply.message)

    def first_token_ms(self, grammar: str) -> float:
        """A single stream whose prompt is cached: from the request to its only token."""
        request = self._request(0, grammar, 1)

        async def timed() -> float:
            start = time.perf_counter()
            await self._serve(request)
            return 1000 * (time.perf_counter() - start)

        return asyncio.run(timed())


def throughput(bench: Bench, streams: int, new_tokens: int, rounds: int) -> dict[str, Any]:
    """Medians of each kind, and of its ratios within a round to the run without a schema."""
    runs: dict[str, list[Run]] = {kind: [] for kind in KINDS}
    for number in range(rounds + 1):
        turn = number % len(KINDS)
        for kind in (*KINDS[turn:], *KINDS[:turn]):
            run = bench.run(kind, streams, new_tokens)
            if number:  # the first round warms up
                runs[kind].append(run)
    return {kind: _medians(of, runs["none"]) for kind, of in runs.items()}


def _medians(runs: list[Run], free: list[Run]) -> dict[str, Any]:
    """`free`: the runs without a schema, of the same rounds."""
    ratios = [run.tokens_per_s / other.tokens_per_s for run, other in zip(runs, free, strict=True)]
    middle = Run(*(statistics.median(each) for each in zip(*map(astuple, runs), strict=True)))
    cpu = statistics.median(
        run.cpu_ms_per_token / other.cpu_ms_per_token for run, other in zip(runs, free, strict=True)
    )
    low, ratio, high = np.quantile(ratios, [0.25, 0.5, 0.75]).tolist()
    return asdict(middle) | {"ratio": ratio, "quartiles": (low, high), "cpu_ratio": cpu}


def first_tokens(bench: Bench, rounds: int) -> dict[str, float]:
    """Median milliseconds to the first token: without a schema, with a known one, with a new one."""
    times: dict[str, list[float]] = {"none": [], "warm": [], "cold": []}
    bench.first_token_ms(endless())
    for number in range(rounds):
        grammars = {"none": "", "warm": endless(), "cold": endless(f"people{number}")}
        for kind in (list(grammars), list(grammars)[::-1])[number % 2]:
            times[kind].append(bench.first_token_ms(grammars[kind]))
    return {kind: statistics.median(of) for kind, of in times.items()}


def mask_times(vocabulary: Vocabulary, outputs: int, tokens: int) -> dict[str, float]:
    """Milliseconds of CPU time for one mask, over so many random outputs: median, 99th percentile and most."""
    matcher, times = compile_grammar(vocabulary, endless()), []
    for seed in range(outputs):
        chance, one = random.Random(seed), matcher.deep_copy()
        for _ in range(tokens):
            start = time.thread_time()
            mask = one.compute_bitmask()
            times.append(1000 * (time.thread_time() - start))
            allowed = np.flatnonzero(np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little"))
            one.consume_token(int(chance.choice(allowed)))
    return {"median": float(np.median(times)), "p99": float(np.quantile(times, 0.99)), "most": max(times)}


def report(found: dict[int, dict[str, Any]], first: dict[str, float], masks: dict[str, float]) -> str:
    """Markdown."""
    lines = [
        "| streams | tok/s without a schema | with one, masks alone (quartiles) | target | CPU time | as served "
        "| tokens a step, as served |",
        "|---|---|---|---|---|---|---|",
    ]
    for streams, of in found.items():
        masked, served = of["masks"], of["served"]
        low, high = masked["quartiles"]
        target = f"at least {1 - TARGETS[streams]:.2f}" if streams in TARGETS else "none"
        lines.append(
            f"| {streams} | {of['none']['tokens_per_s']:.0f} | {masked['ratio']:.3f} times ({low:.2f}, {high:.2f}) "
            f"| {target} | {masked['cpu_ratio']:.3f} times | {served['ratio']:.3f} times "
            f"| {served['tokens_per_step']:.1f} |"
        )
    lines += [
        "",
        f"First token: {first['none']:.1f} ms without a schema; {first['warm'] - first['none']:+.1f} ms with a known "
        f"one (target: at most {FIRST_TOKEN_TARGET_MS:g}), {first['cold'] - first['none']:+.1f} ms with a new one.",
        "",
        f"A mask: {masks['median']:.3f} ms (median), 99 % at most {masks['p99']:.2f} ms, all {masks['most']:.2f} ms.",
    ]
    return "\n".join(lines)


def build(threads: int, source: str) -> tuple[Engine, Fingerprint, ModelFiles, Vocabulary]:
    """The engine with its model's files and vocabulary."""
    torch.set_num_threads(1)
    config = ModelConfig(source=source)
    files = resolve(config, cache_directory(), progress=lambda stage: None)
    vocabulary = start_loading(files.tokenizer_folder)
    model = load(files, config, has_gpu=torch.cuda.is_available(), progress=lambda stage: None)
    engine = Engine(
        model.model,
        EngineConfig(threads=threads, prompt_lookup=False),
        context_tokens=model.context_tokens,
        fingerprint=model.fingerprint,
        dtype=model.dtype,
        kernel_cache=cache_directory() / "kernels",
        vocabulary=vocabulary,
    )
    return engine, model.fingerprint, files, vocabulary.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--source", default="demo", help="as `model.source` in a config")
    parser.add_argument("--streams", type=int, nargs="+", default=list(STREAMS))
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--first-tokens", type=int, default=30, help="rounds of the first token")
    parser.add_argument("--output", type=Path, default=Path("loadtest/results/structured.json"))
    arguments = parser.parse_args()
    engine, fingerprint, files, vocabulary = build(arguments.threads, arguments.source)
    try:
        bench = Bench(engine, fingerprint, chats(files.tokenizer_folder, max(arguments.streams)))
        first = first_tokens(bench, arguments.first_tokens)
        found = {n: throughput(bench, n, arguments.new_tokens, arguments.rounds) for n in arguments.streams}
    finally:
        engine.stop()
    masks = mask_times(vocabulary, outputs=20, tokens=60)
    print(report(found, first, masks))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"throughput": found, "first_token_ms": first, "mask_ms": masks}, indent=1))


if __name__ == "__main__":
    main()
