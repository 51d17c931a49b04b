"""Where does a step's time go? `python -m loadtest.profile_step`.

Runs the engine in this process, decodes at several numbers of streams and computes a chunk of prefill, and prints the
median milliseconds of each part of a step, beside what this machine's memory would allow. `--contexts` measures
instead whether the context of other requests makes a token dearer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace

from serve_app.config import EngineConfig, ModelConfig
from serve_app.core import Failure, Fingerprint, GenerationRequest, SamplingParams
from serve_app.engine.cpu.layer import FusedLayer
from serve_app.engine.cpu.stack import FusedStack
from serve_app.engine.engine import Engine
from serve_app.engine.host_memory import ask_for_huge_pages
from serve_app.models.cache import cache_directory
from serve_app.models.loader import LoadedModel, load
from serve_app.models.source import resolve

PROMPT_TOKENS = 60
READ_BYTES = 2**29
"""Of the read benchmark: above any cache, and about the demo model's weights."""

_OTHER = "others: dispatch, views, residuals"
_KERNEL_PARTS = {
    "gated": "linears", "linear": "linears", "rms_norm": "norms, rotary", "rotate": "norms, rotary",
    "store": "attention", "attend": "attention", "layer": "decoder layers", "layers": "decoder layers",
}  # fmt: skip
PARTS = (
    "decoder layers", "linears", "lm_head", "attention", "norms, rotary", _OTHER,
    "inputs", "sampling", "scheduling", "bookkeeping, publishing",
)  # fmt: skip

Step = dict[str, float]
"""Milliseconds by part, and `total`, `decodes`, `prefilled` (tokens)."""


class Profile:
    """An engine whose parts are timed. It looks inside: the parts of a step are no interface."""

    def __init__(self, engine: Engine, model: LoadedModel, vocabulary: int = 40_000) -> None:
        """`vocabulary`: prompts are made of ids below it."""
        self.engine = engine
        self._model = model.model
        self._vocabulary = vocabulary
        self._requests = 0
        self.fingerprint: Fingerprint = model.fingerprint
        linears = [m for m in model.model.modules() if hasattr(m, "in_features") and hasattr(m, "out_features")]
        self.weight_bytes = sum(getattr(m, "bytes", 4 * m.in_features * m.out_features) for m in linears)  # type: ignore[operator]
        self.steps: list[Step] = []
        self._now: Step = {}
        core = engine._core
        runner, kernels = core.runner, core.sampler._kernels
        if kernels is not None:
            for name, part in _KERNEL_PARTS.items():
                self._time(kernels, name, part)
            head = next(m for m in reversed(linears) if m.out_features == runner.vocab_size)
            self._time(head, "forward", "lm_head")
        self._time(runner, "_forward", "forward")
        self._time(runner, "step", "step")
        self._time(core.sampler, "sample", "sampling")
        self._time(core.scheduler, "schedule", "scheduling", self._composition)
        for owner, name in ((core, "_collect"), (core, "_finish"), (engine, "_publish")):
            self._time(owner, name, "bookkeeping, publishing")
        self._time(engine, "_step", "total", lambda result: self._finish())

    def _time(self, owner: Any, name: str, part: str, then: Callable[[Any], None] = lambda result: None) -> None:
        timed = getattr(owner, name)

        def call(*arguments: Any, **keywords: Any) -> Any:
            start = time.perf_counter()
            result = timed(*arguments, **keywords)
            self._now[part] = self._now.get(part, 0.0) + 1000 * (time.perf_counter() - start)
            then(result)
            return result

        setattr(owner, name, call)

    def _composition(self, chunks: list[Any]) -> None:
        self._now["decodes"] = sum(chunk.tokens == 1 for chunk in chunks)
        self._now["prefilled"] = sum(chunk.tokens for chunk in chunks if chunk.tokens > 1)

    def _finish(self) -> None:
        now, self._now = self._now, {}
        if "step" not in now:
            return
        now["linears"] = max(0.0, now.get("linears", 0.0) - now.get("lm_head", 0.0))
        known = sum(
            now.get(part, 0.0) for part in ("decoder layers", "linears", "lm_head", "attention", "norms, rotary")
        )
        now["inputs"] = now["step"] - now["forward"]
        now[_OTHER] = now["forward"] - known
        self.steps.append(now)

    def take_layers_apart(self) -> None:
        """Compute each layer by its own forward, kernel by kernel, so that each can be timed."""
        for module in self._model.modules():
            if isinstance(vars(module).get("forward"), FusedLayer | FusedStack):
                del module.forward

    def on_the_engines_thread(self, function: Callable[[], float]) -> float:
        """What `function` returns there, where the engine's compute threads are."""
        done, results = threading.Event(), []

        def call() -> None:
            results.append(function())
            done.set()

        self.engine._command(call)
        done.wait()
        return results[0]

    def run(self, requests: Iterable[GenerationRequest]) -> list[Step]:
        """The steps that it took to serve all of them at once."""
        self.steps.clear()

        async def one(request: GenerationRequest) -> None:
            async for reply in self.engine.generate(request):
                if isinstance(reply, Failure):
                    raise SystemExit(reply.message)

        async def everything() -> None:
            await asyncio.gather(*(one(request) for request in requests))

        asyncio.run(everything())
        self.on_the_engines_thread(lambda: 0.0)  # the last answers come out before their step has ended
        return list(self.steps)

    def request(self, prompt: int, new_tokens: int, temperature: float = 0.0) -> GenerationRequest:
        """With a prompt of so many tokens that shares no page with those before it."""
        self._requests = index = self._requests + 1
        ids = tuple(
            (7919 * index + 104_729 * place * place + 31 * place) % self._vocabulary for place in range(1, prompt + 1)
        )
        sampling = SamplingParams(seed=index, temperature=temperature, top_p=0.95 if temperature else 1.0)
        return GenerationRequest("profile", self.fingerprint, ids, sampling, new_tokens)


def read_bandwidth() -> float:
    """Bytes per second of reading memory with all compute threads, in large pages: the best of five."""
    memory = torch.empty(READ_BYTES // 4)
    ask_for_huge_pages(memory)
    memory.fill_(1.0)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        memory.sum()
        best = min(best, time.perf_counter() - start)
    return READ_BYTES / best


def median(steps: list[Step]) -> Step:
    """Part by part."""
    return {part: statistics.median(step.get(part, 0.0) for step in steps) for part in (*PARTS, "total")}


def decode(profile: Profile, streams: int, new_tokens: int, temperature: float = 0.0) -> Step:
    requests = [profile.request(PROMPT_TOKENS, new_tokens, temperature) for _ in range(streams)]
    return median([s for s in profile.run(requests) if s["decodes"] == streams and not s["prefilled"]])


def prefill(profile: Profile, tokens: int) -> Step:
    return median([s for _ in range(3) for s in profile.run([profile.request(tokens, 1)])])


def where(profile: Profile, streams: list[int], new_tokens: int, chunk: int, rounds: int) -> dict[str, Any]:
    """All cases in turn, `rounds` times: the best round of each, and the best read rate around them."""
    rates: list[float] = []
    cases: dict[str, list[Step]] = {}
    for _ in range(rounds):
        rates.append(profile.on_the_engines_thread(read_bandwidth))
        for count in streams:
            cases.setdefault(f"{count}", []).append(decode(profile, count, new_tokens))
        sampled = decode(profile, max(streams), new_tokens, temperature=0.8)
        cases.setdefault(f"{max(streams)} sampled", []).append(sampled)
        cases.setdefault(f"prefill {chunk}", []).append(prefill(profile, chunk))
    return {
        "weight_bytes": profile.weight_bytes,
        "read_bytes_per_s": max(rates),
        "cases": {name: min(steps, key=lambda step: step["total"]) for name, steps in cases.items()},
    }


def table(found: dict[str, Any]) -> str:
    """Markdown: a row a part, a column a case."""
    cases: dict[str, Step] = found["cases"]
    wall = 1000 * found["weight_bytes"] / found["read_bytes_per_s"]
    lines = [
        f"Reading memory: {found['read_bytes_per_s'] / 1e9:.1f} GB/s. The weights of all linear layers, "
        f"{found['weight_bytes'] / 1e6:.0f} MB, take {wall:.1f} ms at that rate.\n",
        "| ms a step | " + " | ".join(cases) + " |",
        "|---" * (len(cases) + 1) + "|",
    ]
    for part in (*(part for part in PARTS if any(case[part] > 0.005 for case in cases.values())), "total"):
        lines.append(f"| {part} | " + " | ".join(f"{case[part]:.2f}" for case in cases.values()) + " |")
    rows = [int(name.split()[-1] if name.startswith("prefill") else name.split()[0]) for name in cases]
    rates = [f"{1000 * n / case['total']:.0f}" for n, case in zip(rows, cases.values(), strict=True)]
    lines.append("| tok/s | " + " | ".join(rates) + " |")
    lines.append("| reading the weights, of the total | " + " | ".join(
        f"{wall / case['total']:.0%}" for case in cases.values()
    ) + " |")  # fmt: skip
    return "\n".join(lines)


def contexts(profile: Profile, totals: list[int], streams: int, new_tokens: int) -> str:
    """Markdown: a step of `streams` short requests while the cache holds others' context, at rest and in use."""
    lines = [
        "| tokens of others' context | ms a step, the others finished | ms a step beside one that decodes with it |",
        "|---|---|---|",
    ]
    for total in totals:
        context = profile.request(total, 1)
        profile.run([context])
        idle = decode(profile, streams, new_tokens)
        other = replace(context, max_new_tokens=new_tokens + 40)  # its prompt is in the cache
        own = [profile.request(PROMPT_TOKENS, new_tokens) for _ in range(streams)]
        beside = median([s for s in profile.run([other, *own]) if s["decodes"] == streams + 1 and not s["prefilled"]])
        lines.append(f"| {total:,} | {idle['total']:.1f} | {beside['total']:.1f} |")
    return "\n".join(lines)


def build(threads: int, source: str, cpu_kernels: bool) -> Profile:
    torch.set_num_threads(1)
    config = ModelConfig(source=source)
    files = resolve(config, cache_directory(), progress=lambda stage: None)
    model = load(files, config, has_gpu=False, progress=lambda stage: None)
    engine = Engine(
        model.model,
        EngineConfig(threads=threads, cpu_kernels=cpu_kernels, prompt_lookup=False),
        context_tokens=model.context_tokens,
        fingerprint=model.fingerprint,
        dtype=model.dtype,
        kernel_cache=cache_directory() / "kernels",
    )
    return Profile(engine, model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--source", default="demo", help="as `model.source` in a config")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--new-tokens", type=int, default=40)
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the prefill chunk")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--contexts", type=int, nargs="*", help="tokens of other requests; default 1000 to 8000")
    parser.add_argument("--no-kernels", action="store_true", help="torch's kernels (engine.cpu_kernels: false)")
    parser.add_argument("--output", type=Path, default=Path("loadtest/results/profile_step.json"))
    arguments = parser.parse_args()
    profile = build(arguments.threads, arguments.source, not arguments.no_kernels)
    try:
        profile.run([profile.request(PROMPT_TOKENS, 8)])
        if arguments.contexts is not None:
            totals = arguments.contexts or [1000, 2000, 4000, 8000]
            print(contexts(profile, totals, streams=8, new_tokens=arguments.new_tokens))
            return
        found = where(profile, arguments.streams, arguments.new_tokens, arguments.prefill, arguments.rounds)
        print(table(found))
        profile.take_layers_apart()
        apart = where(profile, arguments.streams, arguments.new_tokens, arguments.prefill, rounds=1)
        print(f"\nWith each kernel called by itself:\n\n{table(apart)}")
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps({"together": found, "apart": apart}, indent=1))
    finally:
        profile.engine.stop()


if __name__ == "__main__":
    main()
