"""Every attention kernel gives what the plain path gives: on a GPU, or else in Triton's interpreter in small shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from triton_interpreter import teach_bfloat16

from serve_app.engine.attention.base import AttentionBackend, AttentionParams, Span, contiguous_runs
from serve_app.engine.attention.kernel_check import LONG_TOKENS, check_attention
from serve_app.engine.attention.plain import PlainAttention
from serve_app.engine.attention.sdpa import SdpaAttention
from serve_app.engine.cuda import attention as triton_attention
from serve_app.engine.cuda.attention import TritonAttention
from serve_app.engine.kv_cache import LayerShape

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PARAMS = (
    AttentionParams(0.1),
    AttentionParams(0.1, 40),
    AttentionParams(0.1, None, 20.0),
    AttentionParams(0.3, 9, 5.0),
)
LARGE = ((2, 64, 64, 6), (8, 128, 128, 8), (1, 128, 128, 71), (4, 96, 80, 28), (2, 256, 256, 8))
SMALL = ((1, 24, 16, 3),)
"""(KV heads, key width, value width, query heads). A program of the interpreter takes 2 ms."""


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter contexts are split in few parts: a part is a program."""
    pytest.importorskip("triton", reason="needs Triton, which is there for Linux")
    if not ON_GPU:
        teach_bfloat16(monkeypatch)
        monkeypatch.setattr(triton_attention, "_PROGRAMS", 8)


def complaint(
    backend: AttentionBackend, dtype: torch.dtype, shape: Sequence[int], params: AttentionParams
) -> str | None:
    *kv, query_heads = shape
    layer = LayerShape(*kv, dtype, DEVICE)
    small: dict[str, Any] = {} if ON_GPU else {"page_tokens": 16, "long_tokens": 80}
    return check_attention(backend, layer, query_heads, params, **({"long_tokens": LONG_TOKENS} | small))


EVERY_DTYPE = [(dtype, params) for dtype in DTYPES for params in PARAMS]
FEW_DTYPES = [(DTYPES[0], params) for params in PARAMS] + [(dtype, PARAMS[-1]) for dtype in DTYPES[1:]]
"""What a window and a softcap do does not depend on how the numbers are kept."""


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("shape", LARGE if ON_GPU else SMALL)
@pytest.mark.parametrize(("dtype", "params"), EVERY_DTYPE if ON_GPU else FEW_DTYPES)
def test_the_triton_kernels_are_right(
    batch_invariant: bool, dtype: torch.dtype, shape: Sequence[int], params: AttentionParams
) -> None:
    assert complaint(TritonAttention(batch_invariant), dtype, shape, params) is None


@pytest.mark.parametrize("shape", [(2, 16, 16, 2), (1, 16, 16, 71)])
def test_the_triton_kernels_take_any_number_of_heads(shape: Sequence[int]) -> None:
    """One query head for each KV head; more query heads than a program computes."""
    assert complaint(TritonAttention(), torch.float32, shape, AttentionParams(0.1)) is None


@pytest.mark.parametrize("splits", [2, 32])
def test_parts_without_a_key_leave_no_trace(monkeypatch: pytest.MonkeyPatch, splits: int) -> None:
    """A window of a few keys, in more parts than it has tiles."""
    monkeypatch.setattr(TritonAttention, "_splits", staticmethod(lambda programs: splits))
    keys, values = (torch.randn(9, 16, 1, 16, device=DEVICE) for _ in range(2))
    query = torch.randn(2, 2, 16, device=DEVICE)
    spans = [Span(i, 1, length, contiguous_runs(pages, length, 16), pages) for i, length, pages in
             ((0, 70, (1, 3, 5, 7, 2)), (1, 1, (4,)))]  # fmt: skip
    backend, params = TritonAttention(), AttentionParams(0.2, 3)
    found = backend.attend(query, keys, values, params, backend.prepare(spans, DEVICE))
    expected = PlainAttention().attend(query, keys, values, params, spans)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_padding_rows_of_a_recorded_step_come_out_as_zeros() -> None:
    for batch_invariant in (False, True):
        backend = TritonAttention(batch_invariant)
        table = torch.full((backend.table_size(4, 4, 8),), 77, dtype=torch.int64)
        backend.fill(table.numpy(), [Span(0, 1, 20, (), (3, 5))], 4, 4)
        keys = torch.randn(6, 16, 2, 16, device=DEVICE)
        query = torch.randn(4, 4, 16, device=DEVICE)
        output = backend.attend(query, keys, keys, AttentionParams(0.3), backend.view(table.to(DEVICE), 4, 4))
        assert output[0].any()
        assert not output[1:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "params", [AttentionParams(0.125), AttentionParams(0.125, 64), AttentionParams(0.125, None, 20.0)]
)
def test_sdpa_is_right(dtype: torch.dtype, params: AttentionParams) -> None:
    assert check_attention(SdpaAttention(), LayerShape(2, 64, 64, dtype, DEVICE), 8, params) is None
