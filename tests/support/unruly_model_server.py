"""The real model server with a slow engine, so that a test can get in between two tokens, and ways to break it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from serve_app.config import AppConfig
from serve_app.deployments.model_server import ModelServer
from serve_app.engine.scheduler import Chunk

STEP_S = 0.01
POISON = "~"
POISON_ID = 96
"""The id of that text in the tests' byte-level tokenizer. A step that computes a request with it in its prompt kills
the process."""


class UnrulyModelServer(ModelServer):
    """To stand in for `serve_app.app.ModelServer`."""

    async def __init__(self, config: AppConfig) -> None:  # type: ignore[misc]
        await super().__init__(config)
        runner = self._engine._core.runner
        step = runner.step
        self._broken = self._hides_illness = False
        self._continued: set[str] = set()
        self._step_s = STEP_S

        def slow_step(chunks: list[Chunk]) -> Any:
            time.sleep(self._step_s)
            requests = [chunk.sequence.request for chunk in chunks]
            self._continued |= {request.request_id for request in requests if request.output_token_ids}
            if any(POISON_ID in chunk.sequence.request.prompt_token_ids for chunk in chunks):
                os.kill(os.getpid(), signal.SIGKILL)
            if self._broken:
                raise RuntimeError("broken on purpose")
            return step(chunks)

        runner.step = slow_step  # type: ignore[method-assign]

    async def pace(self, step_s: float) -> None:
        """How long a step takes from now on, at least."""
        self._step_s = step_s

    async def strike(self, pid: int, number: int, more_than: int) -> None:
        """The process `pid` sends itself a signal, if it computes so many requests."""
        if os.getpid() == pid and self._engine.stats().running > more_than:
            os.kill(pid, number)

    async def break_engine(self, pid: int, more_than: int = -1) -> bool:
        """In the process `pid` the next step fails, if it computes so many requests; the process lives on.

        Whether it was this one, and does.
        """
        breaks = os.getpid() == pid and self._engine.stats().running > more_than
        self._broken |= breaks
        return breaks

    async def hide_illness(self, hide: bool) -> None:
        """Whether Serve is told that nothing is wrong, and so does not replace it."""
        self._hides_illness = hide

    async def check_health(self) -> None:
        if not self._hides_illness:
            await super().check_health()

    async def continued(self) -> set[str]:
        """Ids of requests that it computed from a token on that others had computed before."""
        return self._continued

    async def knows_its_ingresses(self) -> bool:
        """Whether it has seen alive all those who wait for it: only of them it notices when they die."""
        return self._ingresses._found >= set(self._ingresses._waiting)

    async def where(self) -> tuple[int, int]:
        """Its process, and the requests that it computes."""
        return os.getpid(), self._engine.stats().running


def write_weights(folder: Path, seed: int = 7, eos_token_id: int | None = 2) -> None:
    """A tiny random Llama beside the tokenizer that is in `folder`: 2 layers of width 64, context 1,024."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=417,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            bos_token_id=None,
            eos_token_id=eos_token_id,
            pad_token_id=None,
        )
    )
    for parameter in model.parameters():
        # The usual initialisation is so small that attention hardly matters: errors in it would not show.
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
