"""What do CUDA graphs gain on this GPU? `python -m loadtest.gpu` times decode with them and without, in turn.

The engine alone, in this process, both contenders on the same weights: a model of 1.1 billion random parameters
(TinyLlama's shape; nothing is fetched), or the folder or hub name given with `--model`. Speed doesn't depend on what
the weights say. Both must make the same tokens, or the run says where they part.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from serve_app.config import EngineConfig
from serve_app.core import Failure, Fingerprint, GenerationRequest, SamplingParams
from serve_app.engine.engine import Engine

CONCURRENCY = (1, 8, 32)
PROMPT_TOKENS = 64
FINGERPRINT = Fingerprint("bench")


def load(name: str | None) -> PreTrainedModel:
    """The model in bfloat16 on the GPU."""
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16, device_map="cuda").eval()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
        num_key_value_heads=4, max_position_embeddings=8192,
    )  # fmt: skip
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


async def stream(engine: Engine, prompt: list[int], seed: int, temperature: float, new_tokens: int) -> dict[str, Any]:
    """One request: its ids, and when each came."""
    sampling = SamplingParams(seed=seed, temperature=temperature)
    request = GenerationRequest(str(seed), FINGERPRINT, tuple(prompt), sampling, new_tokens)
    started, ids, times = time.perf_counter(), [], []
    async for reply in engine.generate(request):
        if isinstance(reply, Failure):
            raise SystemExit(f"the engine refused: {reply.message}")
        ids += reply.token_ids
        times += [time.perf_counter()] * len(reply.token_ids)
    return {"ids": ids, "times": times, "ttft_s": times[0] - started}


async def measure(
    engine: Engine, vocab_size: int, count: int, prompt_tokens: int, new_tokens: int, temperature: float
) -> dict[str, Any]:
    """`count` streams at once; the rate while all of them decode."""
    generator = torch.Generator().manual_seed(count)
    prompts = [torch.randint(vocab_size, (prompt_tokens,), generator=generator).tolist() for _ in range(count)]
    streams = await asyncio.gather(
        *(stream(engine, prompt, seed, temperature, new_tokens) for seed, prompt in enumerate(prompts))
    )
    start, end = max(s["times"][0] for s in streams), min(s["times"][-1] for s in streams)
    if start >= end:
        raise SystemExit("the streams did not all decode at once: more --new-tokens or fewer --prompt-tokens")
    tokens = sum(start < moment <= end for s in streams for moment in s["times"])
    return {
        "tok_s": tokens / (end - start),
        "step_ms": 1000 * (end - start) * count / tokens,
        "ttft_ms": 1000 * statistics.median(s["ttft_s"] for s in streams),
        "ids": [s["ids"] for s in streams],
    }


def contenders(model: PreTrainedModel, batch_invariant: bool, memory: str) -> dict[str, Engine]:
    engines = {}
    for name, graphs in (("graphs", True), ("no graphs", False)):
        config = EngineConfig(kv_cache_memory=memory, cuda_graphs=graphs, batch_invariant=batch_invariant)
        started = time.perf_counter()
        context = model.config.get_text_config().max_position_embeddings
        engines[name] = Engine(model, config, context_tokens=context, fingerprint=FINGERPRINT)
        capacity, seconds = engines[name].capacity, time.perf_counter() - started
        print(
            f"{name}: {capacity.attention_backend}, batch-invariant {capacity.batch_invariant}, up in {seconds:.1f} s",
            *capacity.notes, sep="\n  ", flush=True,
        )  # fmt: skip
    return engines


def compare(engines: dict[str, Engine], vocab_size: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All rounds: for each concurrency and temperature both contenders, one after the other."""
    rows: list[dict[str, Any]] = []
    for temperature in (0.0, 1.0):
        for count in CONCURRENCY:
            found: dict[str, list[dict[str, Any]]] = {name: [] for name in engines}
            for number in range(arguments.rounds + 1):
                for name, engine in engines.items():
                    tokens = arguments.new_tokens if number else 8
                    outcome = asyncio.run(
                        measure(engine, vocab_size, count, arguments.prompt_tokens, tokens, temperature)
                    )
                    if number:
                        found[name].append(outcome)
            ids = [outcome.pop("ids") for outcomes in found.values() for outcome in outcomes]
            same = sum(a == b for other in ids[1:] for a, b in zip(ids[0], other, strict=True))
            row: dict[str, Any] = {"temperature": temperature, "streams": count}
            for name, outcomes in found.items():
                for key in ("step_ms", "tok_s", "ttft_ms"):
                    row[f"{name} {key}"] = statistics.median(outcome[key] for outcome in outcomes)
            row["gain"] = row["graphs tok_s"] / row["no graphs tok_s"]
            row["same"] = f"{same}/{count * (len(ids) - 1)}"
            rows.append(row)
            print(line(row), flush=True)
    return rows


HEADER = """\
| temperature | streams | graphs ms/step | tok/s | TTFT ms | none ms/step | tok/s | TTFT ms | gain | same texts |
|---|---|---|---|---|---|---|---|---|---|"""


def line(row: dict[str, Any]) -> str:
    figures = [
        f"{row[f'{name} {key}']:.{digits}f}"
        for name in ("graphs", "no graphs")
        for key, digits in (("step_ms", 2), ("tok_s", 0), ("ttft_ms", 1))
    ]
    return f"| {row['temperature']} | {row['streams']} | {' | '.join(figures)} | {row['gain']:.2f} | {row['same']} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder or hub name; default: random weights")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--prompt-tokens", type=int, default=PROMPT_TOKENS)
    parser.add_argument("--batch-invariant", action="store_true", help="engine.batch_invariant for both")
    parser.add_argument("--kv-cache-memory", default="4GiB")
    parser.add_argument("--output", type=Path, default=Path("loadtest/results/gpu.json"))
    arguments = parser.parse_args()
    model = load(arguments.model)
    engines = contenders(model, arguments.batch_invariant, arguments.kv_cache_memory)
    print(HEADER, flush=True)
    rows = compare(engines, model.config.get_text_config().vocab_size, arguments)
    for engine in engines.values():
        engine.stop()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    arguments.output.write_text(
        json.dumps({"machine": machine, "batch_invariant": arguments.batch_invariant, "rows": rows}, indent=1)
    )
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
