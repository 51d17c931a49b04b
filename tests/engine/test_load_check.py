"""The check of batch invariance finds what it is for, in a number of steps that a start can bear."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tabled_attention import TabledPlain

from serve_app.engine import load_check
from serve_app.engine.attention.base import Span
from serve_app.engine.engine import Engine
from serve_app.engine.kv_budget import allocate
from serve_app.engine.load_check import check_batch_invariance, check_model, measure_row_cost
from serve_app.engine.model_runner import ModelRunner
from serve_app.engine.prompt_lookup import ROW_COST
from serve_app.engine.scheduler import Chunk


@pytest.fixture
def runner(make_engine: Callable[..., Engine], kernel_folder: Path, kernels: object) -> ModelRunner:
    """Of an engine that is batch-invariant and has nothing to do."""
    engine = make_engine(kernel_cache=kernel_folder)
    assert engine.capacity.batch_invariant
    return engine._core.runner


def _spoil(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch, when: Callable[[Sequence[Chunk]], bool]) -> None:
    """The last bits of the logits of steps for which `when` holds are others."""
    step = runner.step

    def spoiled(chunks: Sequence[Chunk]) -> torch.Tensor:
        wrong = when(chunks)
        return step(chunks) * (1.0001 if wrong else 1.0)

    monkeypatch.setattr(runner, "step", spoiled)


def _with_pages(runner: ModelRunner, num_pages: int) -> ModelRunner:
    """Give the runner a new cache of that many pages, and return it."""
    runner.use(runner.backend, allocate(runner, num_pages, runner.cache.page_tokens))
    return runner


def _batch_invariant(runner: ModelRunner, longest_tokens: int = 0) -> bool:
    with torch.inference_mode():
        return check_batch_invariance(runner, longest_tokens)


@pytest.mark.parametrize(
    ("what", "when"),
    [
        ("a long context's decode", lambda chunks: chunks[0].tokens == 1 and chunks[0].sequence.computed > 30),
        ("a short context's decode", lambda chunks: chunks[0].tokens == 1 and 0 < chunks[0].sequence.computed < 7),
        ("company", lambda chunks: len(chunks) > 1),
        ("a chunk that is not the first", lambda chunks: any(c.sequence.computed and c.tokens > 1 for c in chunks)),
    ],
)
def test_one_bit_of_difference_is_found(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch, what: str, when: Callable[[Sequence[Chunk]], bool]
) -> None:
    assert _batch_invariant(runner)
    _spoil(runner, monkeypatch, when)
    assert not _batch_invariant(runner), what


@pytest.mark.parametrize(
    ("served", "when"),
    [
        (4096, lambda chunk: chunk.tokens == 1 and chunk.sequence.computed > 512),
        (4096, lambda chunk: chunk.tokens == 1 and 384 <= chunk.sequence.computed < 400),
        (4096, lambda chunk: chunk.tokens == 1 and 193 <= chunk.sequence.computed < 210),
        (4096, lambda chunk: chunk.tokens > 1 and 200 < chunk.sequence.computed < 500),
        (300, lambda chunk: chunk.tokens == 1 and chunk.sequence.computed > 291),
    ],
)
def test_a_kernel_that_changes_with_long_contexts_is_found_where_they_are_served(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch, served: int, when: Callable[[Chunk], bool]
) -> None:
    assert _batch_invariant(runner, served)
    _spoil(runner, monkeypatch, lambda chunks: any(when(chunk) for chunk in chunks))
    assert _batch_invariant(runner), "short contexts don't show it"
    assert not _batch_invariant(runner, served)


def test_long_contexts_wait_for_each_other_in_a_small_cache(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _batch_invariant(_with_pages(runner, 33), 520)
    _spoil(runner, monkeypatch, lambda chunks: any(c.tokens == 1 and c.sequence.computed > 512 for c in chunks))
    assert not _batch_invariant(runner, 520)


class ChangingWithLength(TabledPlain):
    """Batch-invariant, but for one row alone over more than 400 keys."""

    def prepare(self, spans: list[Span], device: torch.device) -> Any:
        return spans, super().prepare(spans, device)

    def attend(self, query: torch.Tensor, keys: Any, values: Any, params: Any, step: Any) -> Any:
        spans, table = step
        output = super().attend(query, keys, values, params, table)
        for span in spans:
            if span.query_len == 1 and span.kv_len > 400:
                output[span.query_start] *= 1.0001
        return output


@pytest.mark.parametrize(("context", "batch_invariant"), [(1024, False), (300, True)])
def test_an_engine_claims_batch_invariance_up_to_the_contexts_that_it_serves(
    make_engine: Callable[..., Engine], kernel_folder: Path, kernels: object, context: int, batch_invariant: bool
) -> None:
    engine = make_engine(kernel_cache=kernel_folder, context=context, backends=[ChangingWithLength], cuda_graphs=False)
    assert engine.capacity.attention_backend == "tabled"
    assert engine.capacity.batch_invariant == batch_invariant


@pytest.mark.parametrize(("longest", "most"), [(0, 55), (4096, 55 + 25)])
def test_it_takes_few_steps(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch, longest: int, most: int) -> None:
    steps = 0

    def count(chunks: Sequence[Chunk]) -> bool:
        nonlocal steps
        steps += 1
        return False

    _spoil(runner, monkeypatch, count)
    assert _batch_invariant(runner, longest)
    assert steps < most


def test_a_quantised_model_may_round(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    _spoil(runner, monkeypatch, lambda chunks: True)
    with torch.inference_mode():
        assert check_model(runner) is None, "1e-4 is rounding anyway"
        step = runner.step
        monkeypatch.setattr(runner, "step", lambda chunks: step(chunks) * 1.02)
        complaint = check_model(runner)
        assert complaint is not None
        assert "at most 0.002" in complaint
        monkeypatch.setattr(runner, "quantized", True)
        assert check_model(runner) is None
        monkeypatch.setattr(runner, "step", lambda chunks: step(chunks) * 1.3)
        assert check_model(runner) is not None


def test_the_cost_of_a_row_is_measured(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of one row takes 100 ms here, and 15 more for each row after it; now and then something disturbs it."""
    now, steps, step = [0.0], [0], runner.step

    def timed(chunks: Sequence[Chunk]) -> torch.Tensor:
        steps[0] += 1
        now[0] += 0.1 + 0.015 * (sum(chunk.tokens for chunk in chunks) - 1) + 0.5 * (steps[0] % 3 == 0)
        return step(chunks)

    monkeypatch.setattr(runner, "step", timed)
    monkeypatch.setattr(load_check.time, "perf_counter", lambda: now[0])
    assert measure_row_cost(runner) == pytest.approx(0.15)
    assert steps[0] == 8
    assert measure_row_cost(_with_pages(runner, 6)) == pytest.approx(0.15)
    assert measure_row_cost(_with_pages(runner, 3)) == ROW_COST, "of one sequence nothing is learned"


def test_the_cost_of_a_row_is_a_share(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the clock says."""
    for late, cost in ((-1.0, 0.0), (100.0, 1.0)):
        times = iter([0.0, 1.0] * 4 + [0.0, 1.0 + late] * 4)
        monkeypatch.setattr(load_check.time, "perf_counter", lambda times=times: next(times))
        assert measure_row_cost(runner) == cost
