"""Linear layers with packed float32 weights: each row's result is the same whatever rows are computed beside it.

Weights that came from 16 bit numbers or from codes of 4 or 8 bits (a checkpoint in bfloat16, a GGUF file) are kept in
that form, if every value comes back from it bit for bit. The results are the same bits as with float32 weights, and a
step reads a half or a fifth of the memory. The form is found from the values alone.

Measured on 2 cores with AVX-512, weights [1536, 576] streamed from memory, ours and torch's `F.linear` (MKL): 135 and
128 us at 1 row, 137 and 192 at 8, 240 and 318 at 32, 383 and 501 at 64, 3,580 and 3,270 at 512.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence as SequenceOf
from enum import IntEnum
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from serve_app.engine.cpu.library import Kernels, LinearPart
from serve_app.engine.cpu.widen import HALVES
from serve_app.engine.engine_error import EngineError
from serve_app.engine.host_memory import ask_for_huge_pages

logger = logging.getLogger(__name__)

CHECKED_ROWS = (1, 2, 5, 13, 49, 100)
CHECKED_COLUMNS = 64
_TOLERANCE = 1e-4
"""Largest |a - b| / |b| against torch's own product. Float32 rounding gives about 1e-6, a wrong column 1."""


class Form(IntEnum):
    """How weights are kept: `Form` of `kernels/weights.h`.

    In `CODES4_BY_32`, each 32 codes of 4 bits share a scale and an offset.
    """

    FLOAT32 = 0
    BFLOAT16 = 1
    FLOAT16 = 2
    CODES8_BY_16 = 3
    CODES8_BY_32 = 4
    CODES4_BY_16 = 5
    CODES4_BY_32 = 6


class PackedLinear(nn.Module):
    """`y = x w^T + b` over one packed copy of the weights."""

    def __init__(
        self,
        kernels: Kernels,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        memory: torch.Tensor | None = None,
        form: Form | None = None,
    ) -> None:
        """`weight`: `[out, in]` of float32 on the CPU, with any strides. It is copied, into `memory` of bytes if given.

        `form`: must hold the weight without a loss; by default the smallest form that does.
        """
        super().__init__()
        self._kernels = kernels
        self.out_features, self.in_features = weight.shape
        self.form = smallest_form(kernels, weight) if form is None else form
        if memory is None:
            memory = torch.empty(kernels.packed_bytes(self.form, *weight.shape), dtype=torch.uint8)
        self._packed: torch.Tensor
        self.register_buffer("_packed", memory, persistent=False)
        self._bias = None if bias is None else bias.detach().contiguous()
        kernels.pack(*_matrix(weight), self.form, self._packed.data_ptr())
        self.product = Products([self])

    def part(self) -> LinearPart:
        """The weights as the kernels take them, without a place for the result."""
        bias = None if self._bias is None else self._bias.data_ptr()
        return LinearPart(self._packed.data_ptr(), bias, None, None, self.out_features, self.form)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` -> `[..., out]`."""
        return self.product(x)[0]


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
        for part, result in zip(self._parts, results, strict=True):
            part.result = result.data_ptr()
        rows = x.numel() // self.inner
        self._kernels.linear(x.data_ptr(), self.inner, self._address, len(results), rows, self.inner)
        return results


def smallest_form(kernels: Kernels, weight: torch.Tensor) -> Form:
    """The smallest form that holds a weight `[out, in]` of float32 without a loss."""
    return Form(kernels.form(*_matrix(weight)))


def _matrix(weight: torch.Tensor) -> tuple[int, int, int, int, int]:
    """A weight as the kernels' arguments: address, strides, shape."""
    return weight.data_ptr(), weight.stride(0), weight.stride(1), *weight.shape


def pack_linears(model: PreTrainedModel, kernels: Kernels) -> None:
    """Replace the model's CPU linear layers with packed ones.

    Packed layers compute in float32, whatever the dtype of the weights. Each original weight is freed when it is
    packed, so there are never two copies of all weights.

    Raises:
        EngineError: a packed product differs from torch's: nothing may be served with these kernels.
    """
    found: list[tuple[str, Any, Form, int]] = []
    for name, module in model.named_modules():
        if (weight := _weight(module)) is not None:
            form = smallest_form(kernels, weight.float())
            found.append((name, module, form, kernels.packed_bytes(form, *weight.shape)))
    # One block of memory, which the system can map in large pages. It becomes resident as it is written to.
    memory = torch.empty(sum(size for *_, size in found), dtype=torch.uint8)
    ask_for_huge_pages(memory)
    checked: set[tuple[int, int, Form]] = set()
    kept = whole = 0
    while found:
        name, module, form, size = found.pop(0)
        weight = _weight(module)
        assert weight is not None
        weight, bias = weight.float(), None if module.bias is None else module.bias.detach().float()
        packed = PackedLinear(kernels, weight, bias, memory[:size], form)
        memory = memory[size:]
        if (shape := (packed.out_features, packed.in_features, form)) not in checked:
            _check(packed, weight, bias, name)
            _check_form(kernels, weight[:CHECKED_COLUMNS], form, name)
            checked.add(shape)
        model.set_submodule(name, packed)
        kept, whole = kept + size, whole + 4 * weight.numel()
    logger.info("the linear layers take %.2f GB; as float32 it would be %.2f", kept / 1e9, whole / 1e9)


def _weight(module: nn.Module) -> torch.Tensor | None:
    """The weight `[out, in]` of a layer that can be packed, in its own dtype; None for any other module."""
    if type(module) not in (nn.Linear, Conv1D) or hasattr(module, "_hf_hook"):
        return None
    weight: Any = module.weight
    if weight.dtype not in (torch.float32, *HALVES) or weight.device.type != "cpu":
        return None
    transposed: torch.Tensor = weight.detach().t() if isinstance(module, Conv1D) else weight.detach()
    return transposed


def _check(packed: PackedLinear, weight: torch.Tensor, bias: torch.Tensor | None, name: str) -> None:
    x = torch.randn(max(CHECKED_ROWS), packed.in_features, generator=torch.Generator().manual_seed(0))
    expected = F.linear(x, weight, bias)
    whole = packed(x)
    difference = ((whole - expected).norm() / expected.norm()).item()
    if not difference <= _TOLERANCE:
        raise EngineError(f"the CPU kernels are wrong on this machine: {name} differs by {difference:.2g}")
    if any(not torch.equal(packed(x[:rows]), whole[:rows]) for rows in CHECKED_ROWS):
        raise EngineError(f"the CPU kernels are wrong on this machine: {name} depends on the number of rows")


def _check_form(kernels: Kernels, weight: torch.Tensor, form: Form, name: str) -> None:
    """Raises EngineError unless products of this form equal those of float32 weights bit for bit."""
    x = torch.randn(max(CHECKED_ROWS), weight.shape[1], generator=torch.Generator().manual_seed(1))
    kept, plain = (PackedLinear(kernels, weight, None, form=each) for each in (form, Form.FLOAT32))
    if any(not torch.equal(kept(x[:rows]), plain(x[:rows])) for rows in CHECKED_ROWS):
        raise EngineError(f"the CPU kernels are wrong on this machine: {name} as {form.name} is not the same")
