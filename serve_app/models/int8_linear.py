"""Computes bitsandbytes' 8-bit linear layers on a CPU in integers: the same formula, without the detour over float16.

Promises that a row's result doesn't depend on the other rows: each is scaled by its own largest value, and sums of
integers are exact in any order. Knows no engine.

Measured on 2 cores with AVX-512 and AMX, weights [1536, 576] streamed from memory, at 1 / 8 / 32 rows: bitsandbytes 252
/ 293 / 394 us, the product of `torch._int_mm` with its rows quantised 101 / 117 / 145, our float32 kernels 202 / 238 /
381, `torch._weight_int8pack_mm` 333 / 1,999 / 7,924 in float32 and 96 / 221 / 508 in bfloat16, torchao's
`Int8WeightOnlyConfig` 249 / 306 / 487 (it multiplies by dequantised weights unless the model is compiled).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

_STEPS = 127.0
"""Largest absolute value of the int8 numbers; a weight is `CB * SCB / 127`."""
_CHECKED_ROWS = (1, 7, 33)


class Int8Linear(nn.Module):
    """`y = x w^T + b` with int8 weights, rows of `x` rounded to int8 and products summed in int32.

    The arithmetic of LLM.int8() without outliers (Dettmers et al. 2022, https://arxiv.org/abs/2208.07339, section 2).
    """

    def __init__(self, weight: torch.Tensor, largest: torch.Tensor, bias: torch.Tensor | None) -> None:
        """`weight`: int8 `[out, in]`, not copied. `largest`: `[out]`, the value that 127 stands for in each row."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight: torch.Tensor
        self.scale: torch.Tensor
        self.bias: torch.Tensor | None
        self.register_buffer("weight", weight)
        self.register_buffer("scale", largest.float() / _STEPS**2)
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` -> `[..., out]` in the dtype of `x`. Infinite and undefined numbers come out as such."""
        rows = x.reshape(-1, self.in_features).float()
        largest = torch.linalg.vector_norm(rows, ord=math.inf, dim=-1, keepdim=True)
        whole = (rows * (_STEPS / largest)).round_().to(torch.int8)
        y = (torch._int_mm(whole, self.weight.t()) * largest).mul_(self.scale)
        if self.bias is not None:
            y += self.bias
        result: torch.Tensor = y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)
        return result


def use_int8_linears(model: PreTrainedModel) -> int:
    """Replace bitsandbytes' 8-bit layers of a model on the CPU, and return their number.

    0 where torch has no fast and exact integer product: without AVX-512 `torch._int_mm` is a plain loop.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not _product_is_exact():
        return 0
    from bitsandbytes.nn.modules import Linear8bitLt  # a second of imports, only for those who quantise

    replaced = 0
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear8bitLt):
            weight: Any = module.weight
            bias = None if module.bias is None else module.bias.detach().float()
            model.set_submodule(name, Int8Linear(weight.CB, weight.SCB, bias))
            replaced += 1
    return replaced


def _product_is_exact() -> bool:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (96, 320), generator=generator, dtype=torch.int8)
    weight[0] = 127  # the largest sum there can be
    x = torch.randint(-127, 128, (max(_CHECKED_ROWS), 320), generator=generator, dtype=torch.int8)
    x[0] = -127
    expected = (x.long() @ weight.long().t()).int()
    return all(torch.equal(torch._int_mm(x[:rows], weight.t()), expected[:rows]) for rows in _CHECKED_ROWS)
