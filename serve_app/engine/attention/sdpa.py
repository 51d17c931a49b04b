"""PyTorch's scaled dot product attention, one sequence at a time, reading contiguous runs of pages in place.

There is no mask over several sequences and no copy of the cache, so the cost of a sequence depends on its own tokens
only. Query heads that share a key head are packed as rows of one product, so keys are read once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from serve_app.engine.attention.base import AttentionBackend, AttentionParams, Span, visible
from serve_app.engine.attention.plain import gather, plain_attention, row_blocks


def read(cache: torch.Tensor, span: Span) -> torch.Tensor:
    """The span's tokens `[kv_len, kv_heads, dim]`: a view where they lie in one run, a copy otherwise."""
    if len(span.runs) == 1:
        start, size = span.runs[0]
        return cache.flatten(0, 1)[start : start + size]
    return gather(cache, span)


class SdpaAttention(AttentionBackend):
    """For CPUs without our kernels, and for CUDA where neither Triton's nor the varlen kernel can be used."""

    name = "sdpa"
    page_tokens = 16

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, params: AttentionParams, step: list[Span]
    ) -> torch.Tensor:
        outputs = []
        for span in step:
            rows = query[span.query_start : span.query_start + span.query_len]
            key, value = read(keys, span), read(values, span)
            if params.softcap is not None:
                mask = visible(span, params.sliding_window, query.device)
                outputs.append(plain_attention(rows, key, value, mask, params))
            elif span.query_len == 1:
                outputs.append(self._decode(rows, key, value, params))
            else:
                outputs.append(self._prefill(rows, key, value, span, params))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _decode(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, params: AttentionParams
    ) -> torch.Tensor:
        if params.sliding_window is not None and len(key) > params.sliding_window:
            key, value = key[-params.sliding_window :], value[-params.sliding_window :]
        packed = query.view(1, key.shape[1], -1, query.shape[-1])
        output = F.scaled_dot_product_attention(
            packed, key.transpose(0, 1)[None], value.transpose(0, 1)[None], scale=params.scaling
        )
        return output.reshape(1, query.shape[1], -1)

    def _prefill(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, span: Span, params: AttentionParams
    ) -> torch.Tensor:
        first_key = 0
        if params.sliding_window is not None:
            first_key = max(0, span.kv_len - span.query_len - params.sliding_window + 1)
            key, value = key[first_key:], value[first_key:]
        windowed = params.sliding_window is not None and span.kv_len > params.sliding_window
        from_start = span.kv_len == span.query_len and not windowed
        mask = None if from_start else visible(span, params.sliding_window, query.device, first_key)
        if mask is None or query.device.type == "cpu":
            return _sdpa(query, key, value, mask, params)
        # With a mask and grouped heads, torch's kernels for GPUs keep all scores in memory: compute few rows at a time.
        blocks = row_blocks(len(query), query.shape[1], len(key))
        return torch.cat([_sdpa(query[block], key, value, mask[block], params) for block in blocks])


def _sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, params: AttentionParams
) -> torch.Tensor:
    """Takes and returns the shapes of `plain_attention`; without a mask each query sees the keys up to its own."""
    output = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=params.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output[0].transpose(0, 1)
