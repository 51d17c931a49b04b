"""What the runner finds out about a model, and what a step of it takes."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model

from serve_app.engine import model_runner
from serve_app.engine.attention.base import AttentionParams, Span, visible
from serve_app.engine.attention.plain import plain_attention
from serve_app.engine.engine_error import EngineError
from serve_app.engine.model_runner import ModelRunner, _Probe

TOKENS = 2048


@pytest.fixture
def counted_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA device's counters, which say nothing."""
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 0)


@pytest.mark.usefixtures("counted_memory")
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_probe_never_multiplies_all_queries_with_all_keys(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    runner = ModelRunner(tiny_model(kind))
    sizes: list[int] = []
    rows = 0

    def recorded(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, params: AttentionParams
    ) -> torch.Tensor:
        nonlocal rows
        rows += len(query)
        sizes.append(len(query) * len(key))
        return query

    monkeypatch.setattr(model_runner, "plain_attention", recorded)
    with torch.inference_mode():
        assert runner.peak_bytes(TOKENS) == 0
    assert rows == TOKENS * len(runner.layers)
    assert max(sizes) == 256 * TOKENS, "the last queries see all keys, as a step's do"


@pytest.mark.parametrize("tokens", [1, 4, 256, 257, 700])
@pytest.mark.parametrize(
    "params", [AttentionParams(0.3), AttentionParams(0.3, 5), AttentionParams(0.3, 300), AttentionParams(0.3, 300, 4.0)]
)
def test_a_probe_attends_in_blocks_as_it_would_at_once(tokens: int, params: AttentionParams) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, n, tokens, d, generator=generator) for n, d in ((4, 16), (2, 16), (2, 24)))
    found = _Probe().attend(0, query, key, value, params)
    mask = visible(Span(0, tokens, tokens, (), ()), params.sliding_window, query.device)
    expected = plain_attention(*(tensor[0].transpose(0, 1) for tensor in (query, key, value)), mask, params)
    torch.testing.assert_close(found, expected[None])


@pytest.mark.usefixtures("counted_memory")
def test_a_step_for_which_there_is_no_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = ModelRunner(tiny_model("llama"))

    def short(*arguments: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 98.00 GiB.\nMore")

    monkeypatch.setattr(model_runner, "plain_attention", short)
    with torch.inference_mode(), pytest.raises(EngineError) as refused:
        runner.peak_bytes(TOKENS)
    assert "2048 tokens" in str(refused.value)
    assert "engine.max_step_tokens" in str(refused.value)
    assert "\n" not in str(refused.value)
