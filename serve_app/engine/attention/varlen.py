"""CUDA: PyTorch's variable-length flash attention over a block table, all sequences of a step in one call a layer.

Always with one split: automatic splits over paged keys are reported to give NaN or unwritten rows
(pytorch/torchtitan#3235, pytorch/pytorch#194167), and one split makes a row independent of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch.nn.attention.varlen import varlen_attn

from serve_app.engine.attention.base import AttentionBackend, AttentionParams, Span
from serve_app.engine.kv_cache import LayerShape


@dataclass(frozen=True, slots=True)
class VarlenStep:
    """A step as the kernel's arguments, on the device."""

    query_starts: torch.Tensor
    kv_starts: torch.Tensor
    kv_lens: torch.Tensor
    block_table: torch.Tensor
    max_query: int
    max_kv: int


class VarlenAttention(AttentionBackend):
    """16-bit CUDA tensors, pages of 256 tokens, causal with an optional window."""

    name = "varlen"
    page_tokens = 256
    page_multiple = 256
    reads_runs = False

    @classmethod
    def refusal(cls, shape: LayerShape, params: AttentionParams) -> str | None:
        if shape.device.type != "cuda":
            return f"the varlen kernel needs CUDA, not {shape.device.type}"
        if shape.dtype not in (torch.float16, torch.bfloat16):
            return f"the varlen kernel needs float16 or bfloat16, not {shape.dtype}"
        if params.softcap is not None:
            return "the varlen kernel has no softcap"
        return None

    def prepare(self, spans: list[Span], device: torch.device) -> VarlenStep:
        query_lens = [span.query_len for span in spans]
        kv_lens = [span.kv_len for span in spans]
        width = max(len(span.pages) for span in spans)
        table = [[*span.pages, *[0] * (width - len(span.pages))] for span in spans]

        def on_device(values: list[int] | list[list[int]]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32).to(device, non_blocking=True)

        return VarlenStep(
            query_starts=on_device([0, *accumulate(query_lens)]),
            kv_starts=on_device([0, *accumulate(kv_lens)]),
            kv_lens=on_device(kv_lens),
            block_table=on_device(table),
            max_query=max(query_lens),
            max_kv=max(kv_lens),
        )

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, params: AttentionParams, step: VarlenStep
    ) -> torch.Tensor:
        window = -1 if params.sliding_window is None else params.sliding_window - 1
        output = varlen_attn(
            query.contiguous(),
            keys,
            values,
            step.query_starts,
            None,
            step.max_query,
            step.max_kv,
            scale=params.scaling,
            window_size=(window, 0),
            enable_gqa=query.shape[1] != keys.shape[2],
            seqused_k=step.kv_lens,
            block_table=step.block_table,
            num_splits=1,
        )
        assert isinstance(output, torch.Tensor)  # a tuple only when auxiliary results are asked for
        return output
