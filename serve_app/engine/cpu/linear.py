"""Linear layers with packed float32 weights: each row's result is the same whatever rows are computed beside it.

Measured on 2 cores with AVX-512, weights [1536, 576] streamed from memory, against torch's `F.linear` (MKL): 135 and
128 us at 1 row, 137 and 192 at 8, 240 and 318 at 32, 383 and 501 at 64, 3,580 and 3,270 at 512.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence as SequenceOf
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from serve_app.engine.cpu.library import Kernels, LinearPart
from serve_app.engine.cpu.memory import ask_for_huge_pages
from serve_app.engine.errors import EngineError

CHECKED_ROWS = (1, 2, 5, 13, 49, 100)
_TOLERANCE = 1e-4
"""Largest |a - b| / |b| against torch's own product. Float32 rounding gives about 1e-6, a wrong column 1."""


class PackedLinear(nn.Module):
    """`y = x w^T + b` over one packed copy of the weights."""

    def __init__(
        self,
        kernels: Kernels,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        memory: torch.Tensor | None = None,
    ) -> None:
        """`weight` `[out, in]` of float32 on the CPU, of any strides; it is copied, into `memory` if given."""
        super().__init__()
        self._kernels = kernels
        self.out_features, self.in_features = weight.shape
        self._packed = torch.empty(packed_size(kernels, weight)) if memory is None else memory
        self._bias = None if bias is None else bias.detach().contiguous()
        kernels.pack(
            weight.data_ptr(), weight.stride(0), weight.stride(1), self.out_features, self.in_features,
            self._packed.data_ptr(),
        )  # fmt: skip
        self.product = Products([self])

    def part(self) -> LinearPart:
        """The weights as the kernels take them, without a place for the result."""
        bias = None if self._bias is None else self._bias.data_ptr()
        return LinearPart(self._packed.data_ptr(), bias, None, None, self.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` -> `[..., out]`."""
        return self.product(x)[0]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self._bias is not None}"


class Products:
    """Several linear layers of one input, computed in one pass."""

    def __init__(self, linears: SequenceOf[PackedLinear]) -> None:
        self._kernels = linears[0]._kernels
        self._parts = (LinearPart * len(linears))(*(linear.part() for linear in linears))
        self._address = ctypes.addressof(self._parts)
        self.sizes = [linear.out_features for linear in linears]
        self.inner = linears[0].in_features

    def __call__(self, x: torch.Tensor) -> list[torch.Tensor]:
        """`[..., in]` -> `[..., out]` of each layer."""
        x = x.contiguous()
        results = [torch.empty((*x.shape[:-1], size)) for size in self.sizes]
        self.into(x.data_ptr(), [result.data_ptr() for result in results], x.numel() // self.inner)
        return results

    def into(self, x: int, results: SequenceOf[int], rows: int, addend: int | None = None) -> None:
        """The same between addresses: contiguous `[rows, in]` -> `[rows, out]` each, plus `addend` `[rows, out]`."""
        for part, result in zip(self._parts, results, strict=True):
            part.result, part.addend = result, addend
        self._kernels.linear(x, self.inner, self._address, len(self.sizes), rows, self.inner)


def packed_size(kernels: Kernels, weight: torch.Tensor) -> int:
    """Floats that a weight `[out, in]` takes when packed."""
    out, inner = weight.shape
    return -(-out // kernels.panel_columns) * kernels.panel_columns * inner


def pack_linears(model: PreTrainedModel, kernels: Kernels) -> tuple[int, int]:
    """Replace the model's float32 CPU linear layers; (replaced, left as they are because they are something else).

    The original weights go as each is packed, so at no time are there two copies of the whole.

    Raises:
        EngineError: a packed product differs from torch's: nothing may be served with these kernels.
    """
    left = 0
    found: list[tuple[str, Any, int]] = []
    for name, module in model.named_modules():
        weight = _weight(module)
        if weight is None:
            left += _computes_linearly(module)
        else:
            found.append((name, module, packed_size(kernels, weight)))
    # One stretch of memory, which the system can map in large pages; it is taken as it is written to.
    memory = torch.empty(sum(size for _, _, size in found))
    ask_for_huge_pages(memory)
    checked: set[tuple[int, int]] = set()
    replaced = len(found)
    while found:
        name, module, size = found.pop(0)
        weight = _weight(module)
        assert weight is not None
        packed = PackedLinear(kernels, weight, module.bias, memory[:size])
        memory = memory[size:]
        if (shape := (packed.out_features, packed.in_features)) not in checked:
            _check(packed, weight, module.bias, name)
            checked.add(shape)
        model.set_submodule(name, packed)
    return replaced, left


def _weight(module: nn.Module) -> torch.Tensor | None:
    """The `[out, in]` weight of a layer that can be packed."""
    if type(module) not in (nn.Linear, Conv1D) or hasattr(module, "_hf_hook"):
        return None
    weight: Any = module.weight
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        return None
    transposed: torch.Tensor = weight.detach().t() if isinstance(module, Conv1D) else weight.detach()
    return transposed


def _computes_linearly(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _check(packed: PackedLinear, weight: torch.Tensor, bias: torch.Tensor | None, name: str) -> None:
    x = torch.randn(max(CHECKED_ROWS), packed.in_features, generator=torch.Generator().manual_seed(0))
    expected = F.linear(x, weight, bias)
    whole = packed(x)
    difference = ((whole - expected).norm() / expected.norm()).item()
    if not difference <= _TOLERANCE:
        raise EngineError(f"the CPU kernels are wrong on this machine: {name} differs by {difference:.2g}")
    if any(not torch.equal(packed(x[:rows]), whole[:rows]) for rows in CHECKED_ROWS):
        raise EngineError(f"the CPU kernels are wrong on this machine: {name} depends on the number of rows")
