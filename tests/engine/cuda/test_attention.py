"""What the Triton kernels are told of a step, and when they refuse. That they compute it: tests/engine/test_cuda.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from fake_cuda import FakeCuda, FakeKernel
from torch._subclasses import FakeTensorMode

from serve_app.engine.attention.base import AttentionParams, Span
from serve_app.engine.cuda import attention as triton_attention
from serve_app.engine.cuda.attention import TritonAttention, TritonStep
from serve_app.engine.kv_cache import LayerShape


def told(backend: TritonAttention, spans: list[Span], rows: int, most_spans: int) -> tuple[TritonStep, int]:
    """The step as the kernels see it, in a table that held another one before."""
    pages = sum(len(span.pages) for span in spans)
    table = torch.full((backend.table_size(rows, most_spans, pages),), 77, dtype=torch.int64)
    used = backend.fill(table.numpy(), spans, rows, most_spans)
    assert used <= len(table)
    return backend.view(table, rows, most_spans), used


def test_a_small_step_has_a_block_a_token_and_zeros_for_padding() -> None:
    spans = [Span(0, 1, 70, (), (3, 9, 4)), Span(1, 2, 5, (), (8,))]
    step, used = told(TritonAttention(), spans, 4, 4)
    assert step.split
    assert step.queries == 1
    assert step.blocks.tolist() == [[0, 1, 69, 0], [1, 1, 3, 3], [2, 1, 4, 3], [3, 1, -1, 0]]
    assert step.pages.tolist() == [3, 9, 4, 8]
    assert used == 4 * 4 + 4


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_a_large_step_shares_blocks_between_the_tokens_of_a_sequence(batch_invariant: bool) -> None:
    spans = [Span(0, 70, 100, (), (5, 6, 7, 8)), Span(70, 1, 40, (), (1, 2))]
    step, _ = told(TritonAttention(batch_invariant), spans, 128, 8)
    assert not step.split
    blocks = step.blocks.tolist()
    assert blocks[:4] == [[0, 32, 30, 0], [32, 32, 62, 0], [64, 6, 94, 0], [70, 1, 39, 4]]
    assert blocks[4:6] == [[71, 32, -32, 0], [103, 25, -25, 0]], "padding has no context"
    assert all(queries == 0 for _, queries, _, _ in blocks[6:]), "the rest of the launch does nothing"


def test_an_exact_step_is_computed_the_same_way_whatever_its_size() -> None:
    spans = [Span(0, 1, 40, (), (1, 2))]
    small, _ = told(TritonAttention(batch_invariant=True), spans, 1, 1)
    large, _ = told(TritonAttention(batch_invariant=True), spans, 512, 32)
    assert (small.queries, small.split) == (large.queries, large.split) == (32, False)


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_every_step_within_its_sizes_fits_its_table(batch_invariant: bool) -> None:
    backend = TritonAttention(batch_invariant)
    for rows, most in ((1, 1), (33, 33), (64, 7), (65, 32), (128, 32), (512, 1)):
        for sequences in (1, most):
            spans = [Span(i, 1, 9, (), (i,)) for i in range(sequences - 1)]
            spans.append(Span(sequences - 1, rows - sequences + 1, rows, (), (99,)))
            step, _ = told(backend, spans, rows, most)
            covered = [row for first, count, *_ in step.blocks.tolist() for row in range(first, first + count)]
            assert sorted(covered) == list(range(rows))


def test_long_contexts_are_split_until_the_device_is_full() -> None:
    assert [TritonAttention._splits(programs) for programs in (1, 8, 32, 256, 512, 5000)] == [32, 32, 16, 2, 1, 1]


def test_it_refuses_what_it_can_not_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(triton_attention, "kernels", SimpleNamespace())
    assert TritonAttention.refusal(LayerShape(2, 96, 80, torch.bfloat16, cuda), AttentionParams(0.1, 64, 5.0)) is None
    assert "CUDA" in (TritonAttention.refusal(LayerShape(2, 64, 64, torch.float32, cpu), AttentionParams(0.1)) or "")
    assert "float64" in (
        TritonAttention.refusal(LayerShape(2, 64, 64, torch.float64, cuda), AttentionParams(0.1)) or ""
    )
    monkeypatch.setattr(triton_attention, "kernels", None)
    assert "not installed" in (
        TritonAttention.refusal(LayerShape(2, 64, 64, torch.float32, cuda), AttentionParams(0.1)) or ""
    )


@pytest.mark.parametrize("index", [0, 1])
def test_kernels_are_launched_on_the_device_of_the_layer(monkeypatch: pytest.MonkeyPatch, index: int) -> None:
    """Layers may lie on several GPUs (`model.device_map`). Triton launches on the current one, wherever tensors are."""
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    names = ("store", "attend", "combine")
    monkeypatch.setattr(
        triton_attention, "kernels", SimpleNamespace(**{name: FakeKernel(cuda, name) for name in names})
    )
    with FakeTensorMode():
        keys, query, key = (torch.empty(*shape, 64, device=f"cuda:{index}") for shape in ((4, 32, 2), (1, 4), (1, 2)))
        slots, pages, blocks = (torch.empty(size, dtype=torch.int64, device=keys.device) for size in (1, 9, (1, 4)))
        backend = TritonAttention()
        backend.write(keys, keys, slots, key, key)
        backend.attend(query, keys, keys, AttentionParams(0.1), TritonStep(blocks, pages, 1, True))
    assert cuda.log == [(name, index) for name in names]
    assert cuda.current == 0
