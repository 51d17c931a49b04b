"""The check of exactness finds what it is for, in a number of steps that a start can bear."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from serve_app.engine.engine import Engine
from serve_app.engine.load_check import check_exact, check_model
from serve_app.engine.model_runner import ModelRunner
from serve_app.engine.scheduler import Chunk

PAGE = 16


@pytest.fixture
def runner(make_engine: Callable[..., Engine], kernel_folder: Path, kernels: object) -> ModelRunner:
    """Of an engine that is exact and has nothing to do."""
    engine = make_engine(kernel_cache=kernel_folder)
    assert engine.capacity.exact
    return engine._runner


def _spoil(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch, when: Callable[[Sequence[Chunk]], bool]) -> None:
    """The last bits of the logits of steps for which `when` holds are others."""
    step = runner.step

    def spoiled(chunks: Sequence[Chunk]) -> torch.Tensor:
        wrong = when(chunks)
        return step(chunks) * (1.0001 if wrong else 1.0)

    monkeypatch.setattr(runner, "step", spoiled)


def _exact(runner: ModelRunner) -> bool:
    with torch.inference_mode():
        return check_exact(runner, num_pages=20, page_tokens=PAGE)


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
    assert _exact(runner)
    _spoil(runner, monkeypatch, when)
    assert not _exact(runner), what


def test_it_takes_few_steps(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0

    def count(chunks: Sequence[Chunk]) -> bool:
        nonlocal steps
        steps += 1
        return False

    _spoil(runner, monkeypatch, count)
    assert _exact(runner)
    assert steps < 55


def test_a_quantised_model_may_round(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    _spoil(runner, monkeypatch, lambda chunks: True)
    with torch.inference_mode():
        assert check_model(runner, num_pages=20, page_tokens=PAGE) is None, "1e-4 is rounding anyway"
        step = runner.step
        monkeypatch.setattr(runner, "step", lambda chunks: step(chunks) * 1.02)
        complaint = check_model(runner, num_pages=20, page_tokens=PAGE)
        assert complaint is not None
        assert "at most 0.002" in complaint
        monkeypatch.setattr(type(runner), "quantized", property(lambda self: True))
        assert check_model(runner, num_pages=20, page_tokens=PAGE) is None
        monkeypatch.setattr(runner, "step", lambda chunks: step(chunks) * 1.3)
        assert check_model(runner, num_pages=20, page_tokens=PAGE) is not None
