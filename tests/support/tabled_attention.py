"""An attention backend for CPUs that is told of a step by a table, as the GPU's is, and a stand-in for CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from serve_app.engine.attention.base import AttentionParams, Span, TabledAttention
from serve_app.engine.attention.plain import plain_attention


class TabledPlain(TabledAttention):
    """Each row: (position or -1 for padding, where its pages begin), then all the pages."""

    name = "tabled"
    page_tokens = 16
    reads_runs = False

    def table_size(self, rows: int, most_spans: int, most_pages: int) -> int:
        return 2 * rows + most_pages

    def fill(self, table: npt.NDArray[np.int64], spans: Sequence[Span], rows: int, most_spans: int) -> int:
        end = 2 * rows
        table[:end].reshape(-1, 2)[:] = (-1, 0)
        for span in spans:
            for row in range(span.query_len):
                position = span.kv_len - span.query_len + row
                table[2 * (span.query_start + row) :][:2] = (position, end - 2 * rows)
            table[end : end + len(span.pages)] = span.pages
            end += len(span.pages)
        return end

    def view(self, table: torch.Tensor, rows: int, most_spans: int) -> tuple[torch.Tensor, torch.Tensor]:
        return table[: 2 * rows].view(-1, 2), table[2 * rows :]

    def prepare(self, spans: Sequence[Span], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        rows = sum(span.query_len for span in spans)
        table = torch.zeros(self.table_size(rows, 0, sum(len(s.pages) for s in spans)), dtype=torch.int64)
        self.fill(table.numpy(), spans, rows, 0)
        return self.view(table, rows, 0)

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, params: AttentionParams, step: Any
    ) -> torch.Tensor:
        rows, pages = step
        output = query.new_zeros(*query.shape[:2], values.shape[-1])
        for row, (position, first) in enumerate(rows.tolist()):
            if position < 0:
                continue
            held = pages[first : first + position // keys.shape[1] + 1]
            key, value = (stored[held].flatten(0, 1)[: position + 1] for stored in (keys, values))
            mask = torch.ones(1, position + 1, dtype=torch.bool)
            if params.sliding_window is not None:
                mask[:, : max(0, position + 1 - params.sliding_window)] = False
            output[row] = plain_attention(query[row][None], key, value, mask, params)[0]
        return output


class Recorder:
    """Runs again what it was handed, and leaves the result in the same memory, as a CUDA graph does."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        self.recorded += 1
        output = run()

        def replay() -> torch.Tensor:
            self.replayed += 1
            output.copy_(run())
            return output

        return replay
