"""What does prompt lookup gain where text repeats, and cost where it doesn't?

`python -m loadtest.prompt_lookup`. One engine does the same work with it and without, in an order that changes with
each round; a figure is the median of the rounds' ratios. Both must give the same tokens. Work that is "predicted" comes
with a prediction of its answer, as OpenAI's `prediction` is one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from loadtest.prompts import chats
from serve_app.config import EngineConfig, ModelConfig
from serve_app.core import Failure, Fingerprint, GenerationRequest, SamplingParams
from serve_app.engine.engine import Engine
from serve_app.models.cache import cache_directory
from serve_app.models.demo import ensure_demo_model
from serve_app.models.loader import load
from serve_app.models.source import resolve

STREAMS = (1, 8)
_NOTICE = (
    "The library opens at nine on weekdays and at ten on Saturdays. Members may borrow up to twelve books for four "
    "weeks, and renew each of them twice unless somebody else has asked for it. Newspapers and maps stay in the "
    "reading room. The small room on the second floor can be booked for groups of three to eight people; ask at the "
    "desk, by telephone, or on the web page at least one day ahead. Food is not allowed, water in bottles is."
)
_CODE = '''def summarize(orders, minimum=0):
    """Total and mean of the orders that are large enough."""
    total = 0
    count = 0
    for order in orders:
        price = order["price"] * order["quantity"]
        if price < minimum:
            continue
        total += price
        count += 1
    if count == 0:
        return {"total": 0, "mean": 0}
    return {"total": total, "mean": total / count}
'''
_REPEATING = {
    "repeat": f"Repeat the following text word for word, and nothing else.\n\n{_NOTICE}",
    "edit": f"Rename the variable `total` to `amount` in this function, and write the whole function.\n\n{_CODE}",
    "quote": f"{_NOTICE}\n\nList the rules of the library, each as a quotation from the text above.",
}
WORK = {
    "repeat": 0.0,
    "edit": 0.0,
    "quote": 0.0,
    "quote, sampled": 0.7,
    "chat": 0.0,
    "chat, sampled": 1.0,
    "chat, predicted": 0.0,
    "chat, predicted, sampled": 1.0,
}
"""Kinds of work and their temperatures."""
WRONG_EVERY = 16
"""Each so many tokens a prediction has a wrong one."""


def prompts_for(work: str, folder: Path, count: int) -> list[list[int]]:
    """`count` prompts, as ids."""
    kind = work.split(",")[0]
    if kind == "chat":
        return chats(folder, count)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": f"Note {number}. {_REPEATING[kind]}"}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for number in range(count)
    ]


async def run(engine: Engine, fingerprint: Fingerprint, work: dict[str, Any], prompt_lookup: bool) -> dict[str, Any]:
    """Have an idle engine do this work, with guesses or without."""
    engine._core.scheduler.prompt_lookup = prompt_lookup
    before, start = engine.stats().counters, time.perf_counter()

    async def stream(number: int, prompt: list[int]) -> list[int]:
        sampling = SamplingParams(seed=number, temperature=work["temperature"])
        request = GenerationRequest(
            "lookup",
            fingerprint,
            tuple(prompt),
            sampling,
            work["new_tokens"],
            predicted_token_ids=work["predicted"][number] if "predicted" in work else (),
        )
        ids: list[int] = []
        async for reply in engine.generate(request):
            if isinstance(reply, Failure):
                raise SystemExit(reply.message)
            ids.extend(reply.token_ids)
        return ids

    outputs = await asyncio.gather(*(stream(number, prompt) for number, prompt in enumerate(work["prompts"])))
    seconds, after = time.perf_counter() - start, engine.stats().counters
    return {
        "seconds": seconds,
        "output": outputs,
        "steps": after.steps - before.steps,
        "drafted": after.drafted_tokens - before.drafted_tokens,
        "accepted": after.accepted_tokens - before.accepted_tokens,
    }


def nearly(output: list[int]) -> tuple[int, ...]:
    """A prediction of this output that is not quite right."""
    return tuple(0 if place % WRONG_EVERY == WRONG_EVERY - 1 else token_id for place, token_id in enumerate(output))


Run = Callable[[dict[str, Any], bool], dict[str, Any]]
"""(work, with guesses or without) -> what `run` says of it."""


def measure(run: Run, rounds: int, new_tokens: int, names: list[str]) -> list[dict[str, Any]]:
    """A row for each kind of work and number of streams."""
    folder = ensure_demo_model(cache_directory(), progress=lambda stage: None)
    outcomes: dict[tuple[str, int], list[dict[bool, dict[str, Any]]]] = {}
    for number in range(rounds + 1):
        for name in names:
            for streams in STREAMS:
                prompts = prompts_for(name, folder, streams)
                # Round 0 fills the prefix cache.
                work = {"prompts": prompts, "new_tokens": new_tokens if number else 2, "temperature": WORK[name]}
                if "predicted" in name and number:
                    work["predicted"] = [nearly(output) for output in run(work, False)["output"]]
                outcome = {
                    guessing: run(work, guessing) for guessing in ((True, False) if number % 2 else (False, True))
                }
                if number:
                    outcomes.setdefault((name, streams), []).append(outcome)
                    took = f"{outcome[True]['seconds']:.2f} s with, {outcome[False]['seconds']:.2f} s without"
                    print(f"{name} at {streams}: {took}", file=sys.stderr, flush=True)
    return [_row(name, streams, new_tokens, seen) for (name, streams), seen in outcomes.items()]


def _row(name: str, streams: int, new_tokens: int, seen: list[dict[bool, dict[str, Any]]]) -> dict[str, Any]:
    ratios = sorted(outcome[False]["seconds"] / outcome[True]["seconds"] for outcome in seen)
    return {
        "work": name,
        "streams": streams,
        "ratio": statistics.median(ratios),
        "lowest": ratios[0],
        "highest": ratios[-1],
        "without_tokens_per_s": streams * new_tokens / statistics.median(o[False]["seconds"] for o in seen),
        "tokens_per_step": streams * new_tokens / seen[0][True]["steps"],
        "drafted": seen[0][True]["drafted"],
        "accepted": seen[0][True]["accepted"],
        "same": all(outcome[True]["output"] == outcome[False]["output"] for outcome in seen),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| work | streams | tok/s with / without | rounds | tok/s without | tokens a step | guessed | right | same |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['work']} | {row['streams']} | {row['ratio']:.2f} | {row['lowest']:.2f} to {row['highest']:.2f} "
            f"| {row['without_tokens_per_s']:.0f} | {row['tokens_per_step']:.1f} | {row['drafted']} "
            f"| {row['accepted'] / max(1, row['drafted']):.0%} | {'yes' if row['same'] else 'NO'} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--torch-kernels", action="store_true", help="without our own CPU kernels")
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK))
    parser.add_argument("--output", type=Path, default=Path("loadtest/results/prompt_lookup.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = ModelConfig()
    model = load(
        resolve(config, cache_directory(), progress=lambda stage: None),
        config,
        has_gpu=False,
        progress=lambda stage: None,
    )
    engine = Engine(
        model.model,
        EngineConfig(threads=arguments.threads, cpu_kernels=not arguments.torch_kernels),
        context_tokens=model.context_tokens,
        fingerprint=model.fingerprint,
        dtype=model.dtype,
        kernel_cache=cache_directory() / "kernels",
    )
    rows = measure(
        lambda work, guessing: asyncio.run(run(engine, model.fingerprint, work, guessing)),
        arguments.rounds,
        arguments.new_tokens,
        arguments.work,
    )
    engine.stop()
    text = table(rows)
    print(text)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"rows": rows, "table": text}, indent=1))
    if engine.capacity.batch_invariant and not all(row["same"] for row in rows):
        raise SystemExit("the tokens differ")


if __name__ == "__main__":
    main()
