"""The reference holds few scores at a time, and computes the same."""

from __future__ import annotations

import pytest
import torch

from serve_app.engine.attention import plain
from serve_app.engine.attention.base import AttentionParams, Span, visible
from serve_app.engine.attention.plain import plain_attention, row_blocks


@pytest.mark.parametrize(("rows", "heads", "keys"), [(1, 1, 1), (7, 2, 9), (100, 3, 5), (3, 4, 10_000)])
def test_blocks_are_all_rows_in_order_and_hold_few_scores(
    monkeypatch: pytest.MonkeyPatch, rows: int, heads: int, keys: int
) -> None:
    monkeypatch.setattr(plain, "MAX_SCORES", 100)
    blocks = list(row_blocks(rows, heads, keys))
    assert [row for block in blocks for row in range(rows)[block]] == list(range(rows))
    assert all((block.stop - block.start) * heads * keys <= max(100, heads * keys) for block in blocks)


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (6, None), (None, 3.0), (6, 3.0)])
def test_in_blocks_it_is_the_same(monkeypatch: pytest.MonkeyPatch, window: int | None, softcap: float | None) -> None:
    torch.manual_seed(0)
    span = Span(0, 20, 50, (), ())
    params = AttentionParams(scaling=0.3, sliding_window=window, softcap=softcap)
    query, key, value = torch.randn(20, 4, 8), torch.randn(50, 2, 8), torch.randn(50, 2, 8)
    mask = visible(span, window, query.device)
    whole = plain_attention(query, key, value, mask, params)
    monkeypatch.setattr(plain, "MAX_SCORES", 4 * 50 * 3)
    torch.testing.assert_close(plain_attention(query, key, value, mask, params), whole)
