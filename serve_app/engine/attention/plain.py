"""The reference: gathers each sequence's pages and multiplies matrices in float32. Slow and simple.

Every other backend is compared with it at load, and it serves where they fail.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from serve_app.engine.attention.base import AttentionBackend, AttentionParams, Span, visible

MAX_SCORES = 2**24
"""Attention scores that are in memory at a time, in a few copies of 4 bytes. The limit is fixed because the memory of
a step is not measured at load for each length of context."""


def row_blocks(rows: int, heads: int, keys: int) -> Iterator[slice]:
    """Split `rows` queries into blocks of at most `MAX_SCORES` scores each."""
    size = max(1, MAX_SCORES // (heads * keys))
    return (slice(first, min(first + size, rows)) for first in range(0, rows, size))


def gather(cache: torch.Tensor, span: Span) -> torch.Tensor:
    """The span's `kv_len` tokens of `[pages, page_tokens, kv_heads, dim]`, copied: `[kv_len, kv_heads, dim]`."""
    pages = torch.tensor(span.pages, device=cache.device)
    return cache.index_select(0, pages).flatten(0, 1)[: span.kv_len]


def plain_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, params: AttentionParams
) -> torch.Tensor:
    """`[q, heads, d]`, `[k, kv_heads, d]`, `[k, kv_heads, dv]`, `[q, k]` -> `[q, heads, dv]`, in float32 throughout."""
    group = query.shape[1] // key.shape[1]
    keys = key.float().repeat_interleave(group, dim=1)
    values = value.float().repeat_interleave(group, dim=1)
    outputs = []
    for block in row_blocks(len(query), query.shape[1], len(key)):
        scores = torch.einsum("qhd,khd->hqk", query[block].float(), keys) * params.scaling
        if params.softcap is not None:
            scores = torch.tanh(scores / params.softcap) * params.softcap
        weights = scores.masked_fill(~mask[block], float("-inf")).softmax(dim=-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, values).to(query.dtype))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


class PlainAttention(AttentionBackend):
    """One sequence after the other, any device, dtype, window and softcap."""

    name = "plain"
    page_tokens = 16
    reads_runs = False

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, params: AttentionParams, step: list[Span]
    ) -> torch.Tensor:
        output = query.new_zeros(*query.shape[:2], values.shape[-1])
        for span in step:
            rows = slice(span.query_start, span.query_start + span.query_len)
            mask = visible(span, params.sliding_window, query.device)
            output[rows] = plain_attention(query[rows], gather(keys, span), gather(values, span), mask, params)
        return output
