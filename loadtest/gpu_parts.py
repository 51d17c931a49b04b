"""The parts of `loadtest.gpu_suite` that are no tests: `python -m loadtest.gpu_parts speed --mode graphs`.

Each tells what it found in lines of JSON, as soon as it has it, so that a part that is cut off loses the rest alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import sysconfig
import time
import types
from pathlib import Path
from typing import Any

from loadtest.gpu_suite import MODES, RESULT, STREAMS

PROMPT_TOKENS, NEW_TOKENS = 64, 96
CONTEXTS = {"cuda": (500, 2000, 7900), "cpu": (40, 90, 200)}
"""Tokens of the prompts whose continuations must not depend on their company."""


def tell(**found: Any) -> None:
    print(RESULT + json.dumps(found), flush=True)


def machine(device: str) -> None:
    """What this is; fails where torch can't use the device."""
    import torch

    tell(torch=torch.__version__, cuda=torch.version.cuda, python=platform.python_version())
    tell(python_headers=Path(sysconfig.get_path("include"), "Python.h").exists())
    torch.ones(8, device=device).sum().item()
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        tell(device=torch.cuda.get_device_name(), gpus=torch.cuda.device_count(), free_bytes=free, total_bytes=total)


def _without_transformers() -> None:
    """The kernels need of it a name to register by; of the models, nothing."""
    try:
        import transformers  # noqa: F401
    except ImportError:
        stand_in: Any = types.ModuleType("transformers")
        stand_in.AttentionInterface = type("AttentionInterface", (), {})
        sys.modules["transformers"] = stand_in


def kernels(device: str) -> None:
    """Each kernel against the plain path, in the shapes of models that people serve."""
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    _without_transformers()
    import torch

    from serve_app.engine.attention.base import AttentionParams
    from serve_app.engine.attention.kernel_check import check_attention
    from serve_app.engine.attention.varlen import VarlenAttention
    from serve_app.engine.cuda.attention import TritonAttention
    from serve_app.engine.kv_cache import LayerShape

    on = torch.device(device, 0) if device == "cuda" else torch.device(device)
    shapes = (
        [(8, 128, 128, 32), (8, 128, 128, 64), (2, 64, 64, 14), (4, 256, 256, 8)]
        if device == "cuda"
        else [(1, 16, 16, 2)]
    )
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if device == "cuda" else (torch.float32,)
    size: dict[str, Any] = {} if device == "cuda" else {"page_tokens": 16, "long_tokens": 80}
    backends = (
        TritonAttention(),
        TritonAttention(batch_invariant=True),
        *((VarlenAttention(),) if device == "cuda" else ()),
    )
    wrong: dict[str, str] = {}
    tried = 0
    for number, backend in enumerate(backends):
        for *kv, query_heads in shapes:
            for dtype in dtypes:
                for params in (AttentionParams(0.1), AttentionParams(0.1, 4096), AttentionParams(0.1, None, 50.0)):
                    layer = LayerShape(*kv, dtype, on)
                    if device == "cuda" and backend.refusal(layer, params) is not None:
                        continue
                    tried += 1
                    complaint = check_attention(backend, layer, query_heads, params, **size)
                    if complaint is not None:
                        name = f"{backend.name} {number}, {kv}, {query_heads} heads, {dtype}, {params}"
                        wrong[name] = complaint
                        print(f"{name}: {complaint}", flush=True)
    tell(tried=tried, wrong=wrong)
    print(f"{tried - len(wrong)} of {tried} are right")
    if wrong or not tried:
        raise SystemExit(1)


def _model(device: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    if device == "cuda":
        from loadtest.gpu import load

        return load(None)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def _engine(device: str, mode: str) -> tuple[Any, int]:
    """An engine on random weights, and its vocabulary."""
    from loadtest.gpu import FINGERPRINT
    from serve_app.config import EngineConfig
    from serve_app.engine.engine import Engine

    model = _model(device)
    memory = "8GiB" if device == "cuda" else "16MiB"
    config = EngineConfig(
        kv_cache_memory=memory,
        cuda_graphs=mode != "no graphs",
        batch_invariant=mode == "exact",
        max_running=max(STREAMS),
    )
    started = time.perf_counter()
    context = model.config.max_position_embeddings
    engine = Engine(model, config, context_tokens=context, fingerprint=FINGERPRINT)
    tell(
        up_s=time.perf_counter() - started, kernel=engine.capacity.attention_backend, notes=list(engine.capacity.notes)
    )
    print(*engine.capacity.notes, sep="\n", flush=True)
    return engine, model.config.vocab_size


def speed(device: str, mode: str) -> None:
    """Steps, tokens and first tokens at each number of streams."""
    from loadtest.gpu import measure

    engine, vocab = _engine(device, mode)
    prompt, new = (PROMPT_TOKENS, NEW_TOKENS) if device == "cuda" else (4, 12)
    for count in STREAMS if device == "cuda" else STREAMS[:2]:
        asyncio.run(measure(engine, vocab, count, prompt, 8, 1.0))  # the first round is slower
        found = asyncio.run(measure(engine, vocab, count, prompt, new, 1.0))
        row = {key: found[key] for key in ("step_ms", "tok_s", "ttft_ms")}
        row |= {
            "streams": count,
            "kernel": engine.capacity.attention_backend,
            "batch_invariant": engine.capacity.batch_invariant,
        }
        tell(**{f"streams {count:4d}": row})
        print(f"{count} streams: {row['tok_s']:.0f} tok/s", flush=True)
    engine.stop()


def exactness(device: str) -> None:
    """Long prompts alone and together, in the exact mode: the same tokens?"""
    import torch

    from loadtest.gpu import stream

    engine, vocab = _engine(device, "exact")
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(vocab, (length,), generator=generator).tolist() for length in CONTEXTS[device] * 2]
    new = 48 if device == "cuda" else 8

    async def together() -> list[dict[str, Any]]:
        return await asyncio.gather(*(stream(engine, p, seed, 1.0, new) for seed, p in enumerate(prompts)))

    company = [found["ids"] for found in asyncio.run(together())]
    alone = [asyncio.run(stream(engine, p, seed, 1.0, new))["ids"] for seed, p in enumerate(prompts)]
    same = {f"{i}: {len(p)} tokens": company[i] == alone[i] for i, p in enumerate(prompts)}
    tell(batch_invariant=engine.capacity.batch_invariant, same=same)
    engine.stop()
    said = f"the engine says batch-invariant: {engine.capacity.batch_invariant}"
    print(f"{sum(same.values())} of {len(same)} are the same alone and in company; {said}")
    # torch's own attention on a CPU, which serves the trial of the suite, promises nothing.
    if not all(same.values()) or (device == "cuda" and not engine.capacity.batch_invariant):
        raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("machine", "kernels", "speed", "exactness"))
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--mode", choices=MODES, default=MODES[0])
    arguments = parser.parse_args()
    if arguments.part == "speed":
        speed(arguments.device, arguments.mode)
    else:
        {"machine": machine, "kernels": kernels, "exactness": exactness}[arguments.part](arguments.device)


if __name__ == "__main__":
    main()
