"""One contender in a process of its own, driven by lines of JSON: `python -m loadtest.worker KIND`.

Each holds its own copy of the model and its own compute threads, so that contenders can take turns without sharing
thread pools. Only one computes at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from serve_app.config import EngineConfig, ModelConfig
from serve_app.engine.engine import Engine
from serve_app.messages import Failure, GenerationRequest, SamplingParams
from serve_app.models.cache import cache_directory
from serve_app.models.loader import LoadedModel, load
from serve_app.models.source import resolve

Run = Callable[[list[list[int]], int], dict[str, Any]]
"""(prompts, new tokens each) -> seconds, tokens and times to first token of running them all at once."""


def generate_contender(model: LoadedModel, threads: int) -> Run:
    """transformers' own `generate` with its KV cache, one prompt after the other."""
    torch.set_num_threads(threads)

    def run(prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        start = time.perf_counter()
        for prompt in prompts:
            model.model.generate(  # type: ignore[operator]
                torch.tensor([prompt]), max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False
            )
        return {"seconds": time.perf_counter() - start, "tokens": len(prompts) * new_tokens}

    return run


def seed_contender(model: LoadedModel, threads: int) -> Run:
    """The loop this project grew from: `generate(max_new_tokens=1)` for each token, everything computed again."""
    torch.set_num_threads(threads)

    def run(prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        start = time.perf_counter()
        for prompt in prompts:
            ids = torch.tensor([prompt])
            for _ in range(new_tokens):
                ids = model.model.generate(ids, max_new_tokens=1, use_cache=False, do_sample=False)  # type: ignore[operator]
        return {"seconds": time.perf_counter() - start, "tokens": len(prompts) * new_tokens}

    return run


def engine_contender(model: LoadedModel, threads: int) -> Run:
    """Our engine, called from an event loop: all prompts at once, no service around it."""
    torch.set_num_threads(1)
    engine = Engine(
        model.model,
        EngineConfig(threads=threads),
        context_tokens=model.context_tokens,
        fingerprint=model.fingerprint,
        kernel_cache=cache_directory() / "kernels",
    )

    async def stream(prompt: list[int], new_tokens: int) -> float:
        request = GenerationRequest(
            "bench", model.fingerprint, tuple(prompt), SamplingParams(seed=0, temperature=0), new_tokens
        )
        start, first = time.perf_counter(), 0.0
        async for reply in engine.generate(request):
            if isinstance(reply, Failure):
                raise SystemExit(reply.message)
            if reply.token_ids and not first:
                first = time.perf_counter() - start
        return first

    async def all_of(prompts: list[list[int]], new_tokens: int) -> list[float]:
        return list(await asyncio.gather(*(stream(prompt, new_tokens) for prompt in prompts)))

    def run(prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        start = time.perf_counter()
        firsts = asyncio.run(all_of(prompts, new_tokens))
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": len(prompts) * new_tokens, "ttft_s": sorted(firsts)}

    return run


CONTENDERS = {"generate": generate_contender, "seed": seed_contender, "engine": engine_contender}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=CONTENDERS)
    parser.add_argument("--source", default="demo")
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = ModelConfig(source=arguments.source)
    files = resolve(config, cache_directory(), progress=lambda stage: None)
    model = load(files, config, has_gpu=False, progress=lambda stage: None)
    run = CONTENDERS[arguments.kind](model, arguments.threads)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        work = json.loads(line)
        with torch.inference_mode():
            print(json.dumps(run(work["prompts"], work["new_tokens"])), flush=True)


if __name__ == "__main__":
    main()
