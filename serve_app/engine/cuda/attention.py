"""Our own attention for CUDA (`engine/cuda/kernels.py`): one call a layer for all sequences, pages read in place.

A step is described by integers on the device only, so a captured graph serves any step that fits its sizes. Triton
launches on the thread's current device, wherever the tensors are: each launch selects the device of its tensors.
"""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from serve_app.engine.attention.base import AttentionParams, Span, TabledAttention
from serve_app.engine.kv_cache import LayerShape

try:
    from serve_app.engine.cuda import kernels
except ImportError:  # Triton comes with PyTorch's CUDA build for Linux: elsewhere the backend refuses, sdpa serves
    kernels = None  # type: ignore[assignment]

_FEW_ROWS = 64
"""A step of up to this many tokens has one program for each token, and splits long contexts. In a larger step one
program serves several tokens of a prefill, which share the keys that it reads."""
_QUERIES = 32
"""How many tokens of a sequence one program computes in a step of more than `_FEW_ROWS` tokens."""
_PROGRAMS = 512
"""A small step is split until it has about this many programs, four for each of an H100's multiprocessors."""
_MOST_SPLITS = 32
_LARGE_ROW = 256
"""Bytes of a key above which a program takes fewer keys at a time, to stay within the shared memory."""


@dataclass(frozen=True, slots=True)
class TritonStep:
    """A step as the kernels' arguments: `blocks` `[n, 4]` and `pages`, int64 on the device."""

    blocks: torch.Tensor
    pages: torch.Tensor
    queries: int
    """Most tokens in a block."""
    split: bool


class TritonAttention(TabledAttention):
    """Any CUDA dtype, head size, window and softcap."""

    name = "triton"
    page_tokens = 32
    reads_runs = False

    def __init__(self, batch_invariant: bool = False) -> None:
        """`batch_invariant`: compute every step in one way, so that a token's bits don't depend on other tokens."""
        self._batch_invariant = batch_invariant

    @classmethod
    def refusal(cls, shape: LayerShape, params: AttentionParams) -> str | None:
        if kernels is None:
            return "Triton is not installed"
        if shape.device.type != "cuda":
            return f"the Triton kernels need CUDA, not {shape.device.type}"
        if shape.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"the Triton kernels have no {shape.dtype}"
        return None

    @classmethod
    def missing(cls) -> str | None:
        headers = Path(sysconfig.get_path("include"), "Python.h")
        if headers.exists():
            return None
        version = sysconfig.get_python_version()
        return (
            f"Triton compiles with Python's headers, and {headers} is missing: install them "
            f"(Debian: apt install python{version}-dev; Fedora: dnf install python{version}-devel)"
        )

    def _queries(self, rows: int) -> int:
        return _QUERIES if self._batch_invariant or rows > _FEW_ROWS else 1

    def _most_blocks(self, rows: int, spans: int) -> int:
        return min(rows, -(-rows // self._queries(rows)) + spans)

    def table_size(self, rows: int, spans: int, pages: int) -> int:
        return 4 * self._most_blocks(rows, spans + 1) + pages

    def fill(self, table: npt.NDArray[np.int64], spans: list[Span], rows: int, most_spans: int) -> int:
        queries = self._queries(rows)
        start = 4 * self._most_blocks(rows, most_spans + 1)
        blocks: list[tuple[int, int, int, int]] = []
        end = start
        for span in spans:
            for first in range(0, span.query_len, queries):
                position = span.kv_len - span.query_len + first
                blocks.append((span.query_start + first, min(queries, span.query_len - first), position, end - start))
            table[end : end + len(span.pages)] = span.pages
            end += len(span.pages)
        used = sum(span.query_len for span in spans)
        for first in range(used, rows, queries):
            # A padding block has no context: its output is zeros.
            size = min(queries, rows - first)
            blocks.append((first, size, -size, 0))
        table[: 4 * len(blocks)] = np.array(blocks, dtype=np.int64).ravel()
        table[4 * len(blocks) : start] = 0
        return end

    def view(self, table: torch.Tensor, rows: int, most_spans: int) -> TritonStep:
        start = 4 * self._most_blocks(rows, most_spans + 1)
        return TritonStep(
            table[:start].view(-1, 4),
            table[start:],
            self._queries(rows),
            not self._batch_invariant and rows <= _FEW_ROWS,
        )

    def prepare(self, spans: list[Span], device: torch.device) -> TritonStep:
        rows = sum(span.query_len for span in spans)
        size = self.table_size(rows, len(spans), sum(len(span.pages) for span in spans))
        table = torch.empty(size, dtype=torch.int64, pin_memory=device.type == "cuda")
        self.fill(table.numpy(), spans, rows, len(spans))
        return self.view(table.to(device, non_blocking=True), rows, len(spans))

    def write(
        self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        tokens, heads, key_dim = key.shape
        value_dim = value.shape[2]
        key, value = _dense(key), _dense(value)
        with torch.cuda.device_of(keys):  # type: ignore[no-untyped-call]
            kernels.store[(tokens, heads)](
                key, value, slots, keys, values, key.stride(0), key.stride(1), value.stride(0), value.stride(1),
                heads, key_dim, value_dim, _block(key_dim), _block(value_dim), num_warps=1,
            )  # fmt: skip

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, params: AttentionParams, step: TritonStep
    ) -> torch.Tensor:
        query = _dense(query)
        tokens, query_heads, key_dim = query.shape
        kv_heads, value_dim = keys.shape[2], values.shape[3]
        group = query_heads // kv_heads
        heads_each = min(_power_of_two(group), 64 if step.queries == 1 else 4)
        programs = kv_heads * -(-group // heads_each)
        rows = max(16, step.queries * heads_each)
        splits = self._splits(len(step.blocks) * programs) if step.split else 1
        output = query.new_empty(tokens, query_heads, value_dim)
        parts = sums = output
        if splits > 1:
            parts = query.new_empty(tokens, query_heads, splits, value_dim, dtype=torch.float32)
            sums = query.new_empty(tokens, query_heads, splits, 2, dtype=torch.float32)
        softcap = params.softcap or 0.0
        scale = params.scaling if softcap else params.scaling * 1.4426950408889634
        large = max(key_dim, value_dim) * keys.element_size() > _LARGE_ROW
        with torch.cuda.device_of(keys):  # type: ignore[no-untyped-call]
            kernels.attend[(len(step.blocks), programs, splits)](
                query, keys, values, output, parts, sums, step.blocks, step.pages, scale, softcap,
                query.stride(0), query.stride(1),
                query_heads, kv_heads, key_dim, value_dim, _block(key_dim), _block(value_dim), keys.shape[1],
                params.sliding_window or 0, bool(softcap), heads_each, rows, 32 if large else 64, splits,
                num_warps=8 if rows > 64 else 4, num_stages=2,
            )  # fmt: skip
            if splits > 1:
                kernels.combine[(tokens * query_heads,)](
                    output, parts, sums, value_dim, _block(value_dim), splits, num_warps=2
                )
        return output

    @staticmethod
    def _splits(programs: int) -> int:
        return max(1, min(_MOST_SPLITS, _power_of_two(_PROGRAMS // programs + 1) // 2))


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with the numbers of a head side by side, as the kernels need them."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()


def _block(size: int) -> int:
    """The block size that a matrix product in Triton needs for a dimension of `size`."""
    return max(16, _power_of_two(size))
