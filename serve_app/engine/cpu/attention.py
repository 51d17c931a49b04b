"""Our own float32 attention for CPUs (`engine/cpu/kernels/attention.cpp`): one call a layer for all sequences.

Pages are read in place, in any order. The arithmetic of each query is a function of its own sequence only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from serve_app.engine.attention.base import AttentionBackend, AttentionParams, Span
from serve_app.engine.cpu.library import Kernels
from serve_app.engine.kv_cache import LayerShape

_VECTOR = 16
"""`value_dim` must be a multiple of this: the floats of the widest vector."""


@dataclass(frozen=True, slots=True)
class CpuStep:
    """A step as the kernel's arguments: `spans` `[n, 4]` and `pages`, both int32."""

    spans: torch.Tensor
    pages: torch.Tensor


class CpuAttention(AttentionBackend):
    """Keys lie transposed within pages of 16 tokens; larger pages are runs of those."""

    name = "cpu"
    page_tokens = 16
    page_multiple = 16
    reads_runs = False

    def __init__(self, kernels: Kernels, page_tokens: int = 16) -> None:
        self._kernels = kernels
        self._pages_each = page_tokens // kernels.page_tokens

    @classmethod
    def refusal(cls, shape: LayerShape, params: AttentionParams) -> str | None:
        if shape.device.type != "cpu" or shape.dtype != torch.float32:
            return f"the CPU kernel needs float32 on a CPU, not {shape.dtype} on {shape.device.type}"
        if shape.value_dim % _VECTOR:
            return f"the CPU kernel needs heads of a multiple of {_VECTOR} dimensions, not {shape.value_dim}"
        return None

    def prepare(self, spans: list[Span], device: torch.device) -> CpuStep:
        each = self._pages_each
        pages: list[int] = []
        rows: list[tuple[int, int, int, int]] = []
        for span in spans:
            rows.append((span.query_start, span.query_len, span.kv_len, len(pages)))
            pages.extend(span.pages if each == 1 else [p * each + i for p in span.pages for i in range(each)])
        return CpuStep(torch.tensor(rows, dtype=torch.int32), torch.tensor(pages, dtype=torch.int32))

    def write(
        self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        key, value = key.contiguous(), value.contiguous()
        self._kernels.store(
            key.data_ptr(), value.data_ptr(), slots.data_ptr(), slots.numel(), keys.data_ptr(), values.data_ptr(),
            key.shape[1], key.shape[2], value.shape[2],
        )  # fmt: skip

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, params: AttentionParams, step: CpuStep
    ) -> torch.Tensor:
        query = query.contiguous()
        output = torch.empty((*query.shape[:2], values.shape[-1]))
        self._kernels.attend(
            query.data_ptr(), keys.data_ptr(), values.data_ptr(), output.data_ptr(),
            step.spans.data_ptr(), len(step.spans), step.pages.data_ptr(),
            query.shape[1], keys.shape[2], query.shape[2], values.shape[-1],
            params.scaling, params.softcap or 0.0, params.sliding_window or 0,
        )  # fmt: skip
        return output
