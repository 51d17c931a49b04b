"""The reference: gathers each sequence's pages and multiplies matrices in float32. Slow, and hard to get wrong.

Every other backend is checked against it at load, and it serves when one of them fails.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any

import torch

from serve_app.engine.attention.base import AttentionBackend, Heads, Span, visible


def gather(cache: torch.Tensor, span: Span) -> torch.Tensor:
    """The span's `kv_len` tokens of `[pages, page_tokens, kv_heads, dim]`, copied: `[kv_len, kv_heads, dim]`."""
    pages = torch.tensor(span.pages, device=cache.device)
    return cache.index_select(0, pages).flatten(0, 1)[: span.kv_len]


def plain_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, heads: Heads
) -> torch.Tensor:
    """`[q, heads, d]`, `[k, kv_heads, d]`, `[k, kv_heads, dv]`, `[q, k]` -> `[q, heads, dv]`, in float32 throughout."""
    group = query.shape[1] // key.shape[1]
    keys = key.float().repeat_interleave(group, dim=1)
    values = value.float().repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query.float(), keys) * heads.scaling
    if heads.softcap is not None:
        scores = torch.tanh(scores / heads.softcap) * heads.softcap
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, values).to(query.dtype)


class PlainAttention(AttentionBackend):
    """One sequence after the other, any device, dtype, window and softcap."""

    name = "plain"
    page_tokens = 16
    reads_runs = False

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        spans: SequenceOf[Span],
        heads: Heads,
        prepared: Any,
    ) -> torch.Tensor:
        output = query.new_zeros(*query.shape[:2], values.shape[-1])
        for span in spans:
            rows = slice(span.query_start, span.query_start + span.query_len)
            mask = visible(span, heads.sliding_window, query.device)
            output[rows] = plain_attention(query[rows], gather(keys, span), gather(values, span), mask, heads)
        return output
