"""Makes a model whose weights are held in 16 bits compute in float32, in half of the memory of float32 weights.

Every weight keeps its value. Linear layers are packed already (`linear.py`) and embeddings stay in 16 bits, so a
checkpoint stays mapped; the other weights are small and become float32. Knows nothing of files.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from serve_app.engine.engine_error import EngineError
from serve_app.memory import available_memory_bytes

HALVES = (torch.bfloat16, torch.float16)


class WideEmbedding(nn.Module):
    """Rows of a table of 16 bits, as float32."""

    def __init__(self, table: torch.Tensor) -> None:
        """`table` `[tokens, width]`; it is not copied."""
        super().__init__()
        self.num_embeddings = len(table)
        self._table: torch.Tensor
        self.register_buffer("_table", table, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> WideEmbedding:
        """Leave the table in 16 bits when `model.float()` converts the model."""
        return self

    @property
    def weight(self) -> torch.Tensor:
        """A copy of the whole table in float32."""
        return self._table.float()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """`[...]` -> `[..., width]`."""
        return F.embedding(ids, self._table).float()


def widen(model: PreTrainedModel) -> None:
    """Have a model on the CPU, whose weights are held in 16 bits, compute in float32.

    Raises:
        EngineError: there is no memory for what must be float32.
    """
    for name, module in list(model.named_modules()):
        if type(module) is nn.Embedding and module.max_norm is None and module.weight.dtype in HALVES:
            model.set_submodule(name, WideEmbedding(module.weight.detach()))
    needed = sum(4 * parameter.numel() for parameter in model.parameters() if parameter.dtype in HALVES)
    free = available_memory_bytes()
    if free is not None and needed > free:
        raise EngineError(
            f"{needed / 1e9:.1f} GB of memory are needed for weights in float32 and {free / 1e9:.1f} GB are free; with "
            "a C++ compiler (g++ or clang++) they stay in the 16 bits that they came in, or set model.dtype: bfloat16."
        )
    model.float()  # type: ignore[no-untyped-call]
    model.config.dtype = torch.float32
