"""The name of an engine's arithmetic: the same for what gives the same bits, and nothing where nothing is promised."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import collect, prompts_of, request_for

from serve_app.core import TokenBatch
from serve_app.engine.cpu.library import Kernels
from serve_app.engine.engine import Engine
from serve_app.engine.numerics import numerics_id

MakeEngine = Callable[..., Engine]
CPU = torch.device("cpu")


def test_whatever_may_change_a_bit_changes_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def name(backend: str = "sdpa", page_tokens: int = 16, fixed_rows: tuple[int, int] | None = (512, 32)) -> str:
        return numerics_id(backend, None, CPU, page_tokens=page_tokens, fixed_rows=fixed_rows)

    assert name() == name()
    names = {name(), name("plain"), name(page_tokens=32), name(fixed_rows=(1024, 32)), name(fixed_rows=None)}
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    names.add(name())
    monkeypatch.setattr(torch, "__version__", "another")
    names.add(name())
    assert len(names) == 7


async def test_a_batch_invariant_engine_tells_its_name_with_the_first_tokens(
    make_engine: MakeEngine, kernels: Kernels, kernel_folder: Path
) -> None:
    one, other = (make_engine(kernel_cache=kernel_folder, max_running=running) for running in (4, 8))
    assert one.capacity.batch_invariant
    assert one.capacity.numerics_id == other.capacity.numerics_id != ""
    padded = make_engine(batch_invariant=True, max_step_tokens=64)
    assert padded.capacity.numerics_id != one.capacity.numerics_id
    replies = await collect(one, request_for(prompts_of([20])[0], 3))
    batches = [reply for reply in replies if isinstance(reply, TokenBatch) and reply.token_ids]
    told = [batch.stats.numerics_id for batch in (batches[0], batches[-1]) if batch.stats]
    assert told == [one.capacity.numerics_id] * 2  # one batch has it all, where the reader was slower than the engine


def test_an_engine_that_is_not_batch_invariant_promises_nothing(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_app.engine.build.check_batch_invariance", lambda *_, **__: False)
    assert make_engine().capacity.numerics_id == ""
