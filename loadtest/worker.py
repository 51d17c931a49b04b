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
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml

from loadtest.http_load import StreamTimes, timings
from serve_app.config import AppConfig, EngineConfig
from serve_app.core import Failure, GenerationRequest, SamplingParams
from serve_app.engine.cpu.threads import default_threads
from serve_app.engine.engine import Engine
from serve_app.models.cache import cache_directory
from serve_app.models.loader import LoadedModel, load
from serve_app.models.source import resolve


class Run(Protocol):
    """A contender at work."""

    def __call__(self, prompts: list[list[int]], new_tokens: int, concurrency: int | None = None) -> dict[str, Any]:
        """Seconds and tokens of answering all prompts, `concurrency` at a time (None: all at once). The engine also
        says when its tokens came, in `http_load.timings`; the others take one prompt after the other."""


def generate_contender(model: LoadedModel, threads: int) -> Run:
    """transformers' own `generate` with its KV cache."""
    torch.set_num_threads(threads)
    model.in_full()

    def run(prompts: list[list[int]], new_tokens: int, concurrency: int | None = None) -> dict[str, Any]:
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
    model.in_full()

    def run(prompts: list[list[int]], new_tokens: int, concurrency: int | None = None) -> dict[str, Any]:
        start = time.perf_counter()
        for prompt in prompts:
            ids = torch.tensor([prompt])
            for _ in range(new_tokens):
                ids = model.model.generate(ids, max_new_tokens=1, use_cache=False, do_sample=False)  # type: ignore[operator]
        return {"seconds": time.perf_counter() - start, "tokens": len(prompts) * new_tokens}

    return run


def engine_contender(model: LoadedModel, threads: int, config: EngineConfig | None = None) -> Run:
    """Our engine, called from an event loop, with no service around it; by default as a config that is silent."""
    torch.set_num_threads(1)
    engine = Engine(
        model.model,
        (config or EngineConfig()).model_copy(update={"threads": threads}),
        context_tokens=model.context_tokens,
        fingerprint=model.fingerprint,
        dtype=model.dtype,
        kernel_cache=cache_directory() / "kernels",
    )

    async def stream(prompt: list[int], new_tokens: int, epoch: float, places: asyncio.Semaphore) -> StreamTimes:
        request = GenerationRequest(
            "bench", model.fingerprint, tuple(prompt), SamplingParams(seed=0, temperature=0), new_tokens
        )
        async with places:
            times = StreamTimes(time.perf_counter() - epoch, [])
            async for reply in engine.generate(request):
                if isinstance(reply, Failure):
                    raise SystemExit(reply.message)
                if reply.token_ids:
                    times.arrivals_s.append(time.perf_counter() - epoch)
        return times

    async def all_of(prompts: list[list[int]], new_tokens: int, concurrency: int) -> list[StreamTimes]:
        places, epoch = asyncio.Semaphore(concurrency), time.perf_counter()
        return list(await asyncio.gather(*(stream(prompt, new_tokens, epoch, places) for prompt in prompts)))

    def run(prompts: list[list[int]], new_tokens: int, concurrency: int | None = None) -> dict[str, Any]:
        streams = asyncio.run(all_of(prompts, new_tokens, concurrency or len(prompts)))
        return timings(streams) | {"tokens": len(prompts) * new_tokens}

    return run


def config_of(path: Path) -> AppConfig:
    """The application's part of a Serve config, with as many threads as its only model replica would take."""
    config = AppConfig.model_validate(yaml.safe_load(path.read_text())["applications"][0].get("args", {}))
    threads = config.engine.threads or default_threads(given_cpus=config.model_server.num_cpus, only_replica=True)
    return config.model_copy(update={"engine": config.engine.model_copy(update={"threads": threads})})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("generate", "seed", "engine"))
    parser.add_argument("--config", type=Path, default=Path("configs/serve.yaml"), help="whose model and engine it is")
    parser.add_argument("--threads", type=int, help="in place of the config's")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = config_of(arguments.config)
    files = resolve(config.model, cache_directory(config.cache_dir), progress=lambda stage: None)
    model = load(files, config.model, has_gpu=False, progress=lambda stage: None)
    threads = arguments.threads or config.engine.threads
    assert threads is not None
    if arguments.kind == "engine":
        run = engine_contender(model, threads, config.engine)
    else:
        run = {"generate": generate_contender, "seed": seed_contender}[arguments.kind](model, threads)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        work = json.loads(line)
        with torch.inference_mode():
            print(json.dumps(run(**work)), flush=True)


if __name__ == "__main__":
    main()
