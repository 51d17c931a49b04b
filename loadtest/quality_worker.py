"""One quantisation of one model in a process of its own, driven by lines of JSON: `python -m loadtest.quality_worker`.

Scores a text teacher-forced, and generates with the engine as the service does. Only one worker computes at a time.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from loadtest.prompts import chats
from loadtest.worker import engine_contender
from serve_app.config import ModelConfig
from serve_app.engine.kv_budget import CPU_KV_CACHE_BYTES
from serve_app.models.cache import cache_directory
from serve_app.models.loader import LoadedModel, load
from serve_app.models.sizes import stored_weights_bytes
from serve_app.models.source import ModelFiles, resolve

WINDOW_TOKENS = 2048
"""A longer text is scored in windows of this many tokens, each without the ones before it."""
_ROWS = 256
"""Rows of logits turned into probabilities at a time: a whole text's would be some hundred MB more."""


@dataclass(frozen=True, slots=True)
class Score:
    """What a model thinks of a text, summed over all its predictions."""

    surprise_nats: float
    """-log of the probability given to each next token, summed."""
    top: tuple[int, ...]
    """The id called most likely, at each position that has a next token; the lowest one on ties."""


def score_logits(logits: torch.Tensor, ids: list[int]) -> Score:
    """Score of the predictions `[tokens, vocab]` of `ids[1:]`; the last row predicts what is not there."""
    surprise, top = 0.0, []
    following = torch.tensor(ids[1:], device=logits.device)
    for start in range(0, len(ids) - 1, _ROWS):
        rows = logits[start : min(start + _ROWS, len(ids) - 1)].double()
        losses = torch.nn.functional.cross_entropy(rows, following[start : start + len(rows)], reduction="sum")
        surprise += losses.item()
        top.extend(rows.argmax(-1).tolist())
    return Score(surprise, tuple(top))


def windows(ids: list[int], size: int) -> list[list[int]]:
    """`ids` in pieces of at most `size`; a last piece of one token predicts nothing and is left out."""
    pieces = [ids[start : start + size] for start in range(0, len(ids), size)]
    return [piece for piece in pieces if len(piece) > 1]


def score(model: LoadedModel, ids: list[int]) -> Score:
    """Every next token of `ids` predicted from the true ones before it, by the model's own forward."""
    surprise, top = 0.0, []
    for window in windows(ids, min(WINDOW_TOKENS, model.context_tokens)):
        inputs = torch.tensor([window], device=model.device)
        part = score_logits(model.model(input_ids=inputs, use_cache=False).logits[0], window)
        surprise += part.surprise_nats
        top.extend(part.top)
    return Score(surprise, tuple(top))


def resident_bytes() -> int | None:
    """This process's memory, what it shares counted in part; None where the system does not tell."""
    rollup = Path("/proc/self/smaps_rollup")
    if not rollup.exists():
        return None
    return next(int(line.split()[1]) * 1024 for line in rollup.read_text().splitlines() if line.startswith("Pss:"))


class Subject:
    """A loaded model and what has been asked of it."""

    def __init__(self, source: str, kind: str, device: str, threads: int) -> None:
        config = ModelConfig.model_validate({"source": source, "quantization": kind, "device": device})
        self._files: ModelFiles = resolve(config, cache_directory(), progress=lambda stage: None)
        self._before = resident_bytes()
        self._model = load(self._files, config, has_gpu=device == "cuda", progress=lambda stage: None)
        self._threads = threads
        dtype, held = (str(each).removeprefix("torch.") for each in (self._model.dtype, self._model.model.dtype))
        self.facts = {
            "dtype": dtype,
            "device": str(self._model.device),
            "predicted_bytes": stored_weights_bytes(self._files.folder, held, kind),
            "held_bytes": self._model.weights_bytes,
        }
        self._generate: Any = None

    def score(self, text: str) -> dict[str, Any]:
        """Of a text. Before the engine is made, which replaces the model's attention."""
        ids = AutoTokenizer.from_pretrained(self._files.tokenizer_folder)(text)["input_ids"]
        torch.set_num_threads(self._threads)
        start = time.perf_counter()
        self._model.in_full()
        result = score(self._model, ids)
        seconds = time.perf_counter() - start
        torch.set_num_threads(1)
        return {"surprise_nats": result.surprise_nats, "top": result.top, "seconds": seconds} | self.facts

    def generate(self, streams: int, new_tokens: int) -> dict[str, Any]:
        """Greedy answers to as many chats at once; makes the engine when there is none."""
        if self._generate is None:
            self._generate = engine_contender(self._model, self._threads)
        outcome: dict[str, Any] = self._generate(chats(self._files.tokenizer_folder, streams), new_tokens)
        return outcome

    def memory(self) -> dict[str, Any]:
        """How much the process has grown since before the weights, less the KV cache; null where nobody tells."""
        after, device = resident_bytes(), self._model.device.type
        if after is None or self._before is None or device != "cpu":
            return {"grown_bytes": None}
        return {"grown_bytes": after - self._before - CPU_KV_CACHE_BYTES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source")
    parser.add_argument("kind")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    subject = Subject(arguments.source, arguments.kind, arguments.device, arguments.threads)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        work = json.loads(line)
        with torch.inference_mode():
            print(json.dumps(getattr(subject, work.pop("do"))(**work)), flush=True)


if __name__ == "__main__":
    main()
