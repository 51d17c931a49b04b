"""A decoder layer in one call of `kernels/layer.cpp`, for the usual order of its parts and our own attention kernel.

It computes what the layer's own forward computes over its fused parts, bit for bit. `fusion.py` decides which layers it
suits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch

from serve_app.engine.attention.base import STEP_KEYWORD, AttentionStep, PagedStep
from serve_app.engine.cpu.attention import CpuAttention
from serve_app.engine.cpu.forwards import FusedAttention, FusedGatedMLP, FusedNorm, paged_step
from serve_app.engine.cpu.library import Kernels, LayerPlan, NormPlan, StepPlan
from serve_app.engine.kv_cache import LayerShape


class StepPlans:
    """The `StepPlan` of the step that is being computed. Layers of one shape share it and its memory."""

    def __init__(self) -> None:
        self._step: AttentionStep | None = None
        self._rotary: Any = None
        self._alive: tuple[torch.Tensor, ...] = ()
        self._memory: list[torch.Tensor] = []
        self._shape: tuple[int, ...] = ()
        self._plan = StepPlan()

    def known(self, step: AttentionStep | None, position_embeddings: Any, sizes: tuple[int, ...]) -> int | None:
        """Address of the plan if it was made for these arguments, else None."""
        same = step is self._step and position_embeddings is self._rotary and sizes == self._shape[1:]
        return ctypes.addressof(self._plan) if same and step is not None else None

    def make(self, step: PagedStep, position_embeddings: Any, sizes: tuple[int, ...]) -> int | None:
        """Address of the plan of a step whose intermediate results take `sizes` floats a token.

        None where another attention kernel than ours serves.
        """
        if not isinstance(step.backend, CpuAttention):
            return None
        slots, prepared = step.on(torch.device("cpu"))
        cos, sin = (tensor.contiguous() for tensor in position_embeddings)
        tokens = cos.shape[1]
        if self._shape != (tokens, *sizes):
            self._memory = [torch.empty(tokens, size) for size in sizes]
            self._shape = (tokens, *sizes)
        self._step, self._rotary = step, position_embeddings
        self._alive = (cos, sin, slots, prepared.spans, prepared.pages)
        self._plan = StepPlan(
            *(tensor.data_ptr() for tensor in self._alive), tokens, len(prepared.spans),
            *(tensor.data_ptr() for tensor in self._memory),
        )  # fmt: skip
        return ctypes.addressof(self._plan)


class FusedLayer:
    """`x = h + attention(norm(h))`, then `x + mlp(norm(x))`.

    Where there is no `paged_step`, or another kernel attends, the layer's own forward is called.
    """

    def __init__(self, kernels: Kernels, module: Any, own: Callable[..., Any], plans: StepPlans) -> None:
        """`module`: a decoder layer whose four parts already have fused forwards. `own`: the layer's own forward."""
        self._kernels = kernels
        self._own = own
        self._plans = plans
        attention: FusedAttention = module.self_attn.forward
        mlp: FusedGatedMLP = module.mlp.forward
        norms: list[FusedNorm | None] = [
            module.input_layernorm.forward, module.post_attention_layernorm.forward, *attention.norms,
        ]  # fmt: skip
        linears = [*attention.projections, attention.output, mlp.gate, mlp.up, mlp.down]
        dim, params = attention.head_dim, attention.params
        queries, keys, values = (linear.out_features for linear in attention.projections)
        hidden = attention.output.out_features
        self._plan = LayerPlan(
            *(NormPlan(None, 0.0) if n is None else NormPlan(n.scale.data_ptr(), n.eps) for n in norms),
            *(linear.part() for linear in linears),
            hidden, mlp.activation, queries // dim, keys // dim, dim, params.sliding_window or 0,
            params.scaling, params.softcap or 0.0,
        )  # fmt: skip
        self.address = ctypes.addressof(self._plan)
        """Address of the `LayerPlan`, valid as long as this object lives."""
        self.layer, self.head_dim = attention.layer, dim
        self.shape = LayerShape(keys // dim, dim, dim, torch.float32, torch.device("cpu"))
        self.sizes = (hidden, mlp.gate.out_features, hidden, queries, keys, values, queries)
        """Floats a token of each intermediate result. Layers of the same sizes share the memory for them."""

    def __call__(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: Any = None,
        **others: Any,
    ) -> Any:
        step: AttentionStep | None = others.get(STEP_KEYWORD)
        plan = None if attention_mask is not None else self._plans.known(step, position_embeddings, self.sizes)
        if plan is None:
            step = paged_step(hidden_states, attention_mask, position_embeddings, self.head_dim, others)
            if isinstance(step, PagedStep):
                plan = self._plans.make(step, position_embeddings, self.sizes)
        if plan is None:
            return self._own(
                hidden_states, attention_mask=attention_mask, position_embeddings=position_embeddings, **others
            )
        keys, values = step.cache.layer(self.layer)  # type: ignore[union-attr]
        hidden_states = hidden_states.contiguous()
        result = torch.empty_like(hidden_states)
        self._kernels.layer(
            self.address, plan, hidden_states.data_ptr(), result.data_ptr(), keys.data_ptr(), values.data_ptr()
        )
        return result
