"""Forwards of norms, gated MLPs and attention modules in few kernels instead of many tensor operations.

They compute what the modules' own forwards compute, each row on its own, over the weights that `linear.py` packed.
`fusion.py` decides which modules they suit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from typing import Any

import torch

from serve_app.engine.attention.base import STEP_KEYWORD, AttentionParams, AttentionStep
from serve_app.engine.cpu.library import Kernels
from serve_app.engine.cpu.linear import PackedLinear, Products


def _rows(x: torch.Tensor, width: int) -> int:
    """Rows of a kernel's input. Raises ValueError when their width is not `width`, which the kernel can't check."""
    if x.shape[-1] != width:
        raise ValueError(f"rows of {x.shape[-1]} numbers where {width} are computed")
    return x.numel() // width


class FusedNorm:
    """`x / sqrt(mean(x^2) + eps) * scale` over the last dimension."""

    def __init__(self, kernels: Kernels, scale: torch.Tensor, eps: float) -> None:
        self._kernels = kernels
        self.scale = scale.contiguous()
        self.eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        self.into(x, y)
        return y

    def into(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Norm of `x` into `y`: contiguous, of one shape, maybe one tensor. Raises ValueError for another width."""
        dim = self.scale.numel()
        rows = _rows(x, dim)
        self._kernels.rms_norm(x.data_ptr(), self.scale.data_ptr(), self.eps, y.data_ptr(), rows, dim)


class FusedGatedMLP:
    """`down(act(gate(x)) * up(x))`: gate, up and the activation in one pass."""

    def __init__(
        self, kernels: Kernels, gate: PackedLinear, up: PackedLinear, down: PackedLinear, activation: int
    ) -> None:
        """`activation`: 0 is SiLU, 1 the GELU by tanh."""
        self._kernels = kernels
        self.gate, self.up, self.down, self.activation = gate, up, down, activation
        self._parts = (gate.part(), up.part())

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x, inner = x.contiguous(), self.gate.in_features
        y = torch.empty((*x.shape[:-1], self.gate.out_features))
        gate, up = (ctypes.addressof(part) for part in self._parts)
        self._kernels.gated(
            x.data_ptr(), inner, gate, up, self.activation, y.data_ptr(), _rows(x, inner), inner
        )  # fmt: skip
        result: torch.Tensor = self.down(y)
        return result


def paged_step(
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_embeddings: Any,
    head_dim: int,
    keywords: Mapping[str, Any],
) -> AttentionStep | None:
    """The attention step of a module's call, if it is on the paged path and whole heads are rotated; else None."""
    step: AttentionStep | None = keywords.get(STEP_KEYWORD)
    if step is None or attention_mask is not None or position_embeddings is None:
        return None
    whole = (1, hidden_states.shape[1], head_dim)
    return step if all(tensor.shape == whole for tensor in position_embeddings) else None


class FusedAttention:
    """Projections of one input in one pass, norms and rotary positions in place, then the paged attention.

    Where there is no `paged_step`, the module's own forward is called.
    """

    def __init__(self, kernels: Kernels, module: Any, own: Callable[..., Any], params: AttentionParams) -> None:
        """`own`: the module's forward. `params`: what it hands to the attention interface."""
        self._kernels = kernels
        self._own = own
        self.params = params
        self.layer: int = module.layer_idx
        self.head_dim: int = module.head_dim
        self.projections: list[PackedLinear] = [module.q_proj, module.k_proj, module.v_proj]
        norms = (getattr(module, name, None) for name in ("q_norm", "k_norm"))
        self.norms: list[FusedNorm | None] = [None if norm is None else norm.forward for norm in norms]
        self.output: PackedLinear = module.o_proj
        self._products = Products(self.projections)

    def __call__(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Any = None,
        attention_mask: torch.Tensor | None = None,
        **others: Any,
    ) -> Any:
        step = paged_step(hidden_states, attention_mask, position_embeddings, self.head_dim, others)
        if step is None:
            return self._own(
                hidden_states=hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                **others,
            )
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (result.view(shape) for result in self._products(hidden_states))
        cos, sin = (tensor.contiguous() for tensor in position_embeddings)
        for x, norm in zip((query, key), self.norms, strict=True):
            if norm is not None:
                norm.into(x, x)
            self._kernels.rotate(x.data_ptr(), cos.data_ptr(), sin.data_ptr(), *x.shape[1:])
        attended = step.attend(
            self.layer, query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), self.params
        )
        return self.output(attended.reshape(*hidden_states.shape[:-1], -1)), None
