"""All decoder layers of a model in one call of `kernels/layer.cpp`, between its embedding and its last norm.

It computes what the model's own forward computes over its fused layers. `fusion.py` decides which models it suits.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

from serve_app.engine.attention.base import STEP_KEYWORD, PagedStep
from serve_app.engine.cpu.forwards import FusedNorm
from serve_app.engine.cpu.layer import FusedLayer, StepPlans
from serve_app.engine.cpu.library import Kernels
from serve_app.engine.kv_cache import KVCache

FEWEST_ROWS = 1024
"""Least rows of the table of rotary angles, which grows to twice the highest position."""


class RotaryTable:
    """Cosines and sines of the positions so far, computed once by the model's own module."""

    def __init__(self, module: Any) -> None:
        """`module`: `(hidden_states, position_ids) -> (cos, sin)`, each `[1, tokens, head_dim]`."""
        self._module = module
        # With `dynamic` and `longrope` types the angles depend on the longest position so far.
        kind = getattr(module, "rope_type", None)
        self._fixed = isinstance(kind, str) and "dynamic" not in kind and kind != "longrope"
        self._rows = torch.empty(2, 0, 0)

    def at(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of positions `[1, tokens]`: `[1, tokens, head_dim]` each."""
        if not self._fixed:
            cos, sin = self._module(hidden_states, position_ids)
            return cos, sin
        highest = int(position_ids.max())
        if highest >= self._rows.shape[1]:
            positions = torch.arange(max(FEWEST_ROWS, 2 * (highest + 1)))
            self._rows = torch.cat(self._module(hidden_states, positions[None]))
        cos, sin = self._rows.index_select(1, position_ids[0])[:, None]
        return cos, sin


class FusedStack:
    """`norm(layers(embedding(ids)))`.

    A call without a `PagedStep`, with a mask or other options, or for another attention kernel takes the model's own
    forward.
    """

    def __init__(self, kernels: Kernels, module: Any, own: Callable[..., Any], plans: StepPlans) -> None:
        """`module`: a model without its output layer, whose layers have fused forwards already. `own`: its forward."""
        self._kernels = kernels
        self._own = own
        self._plans = plans
        self._embedding = module.embed_tokens
        self._rotary = RotaryTable(module.rotary_emb)
        self._norm: FusedNorm = module.norm.forward
        self._layers: list[FusedLayer] = [layer.forward for layer in module.layers]
        self._count = len(self._layers)
        self._addresses = (ctypes.c_void_p * self._count)(*(layer.address for layer in self._layers))
        self._cache: weakref.ref[KVCache] | None = None
        self._memory: ctypes.Array[ctypes.c_void_p] | None = None

    def __call__(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **others: Any,
    ) -> Any:
        step = others.get(STEP_KEYWORD)
        usual = attention_mask is None and all(v is None or v is False or v is step for v in others.values())
        if usual and isinstance(step, PagedStep) and input_ids is not None and position_ids is not None:
            hidden_states = self._computed(input_ids, position_ids, step)
            if hidden_states is not None:
                return BaseModelOutputWithPast(last_hidden_state=hidden_states)
        return self._own(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **others)

    def _computed(self, ids: torch.Tensor, positions: torch.Tensor, step: PagedStep) -> torch.Tensor | None:
        x = self._embedding(ids)
        embeddings = self._rotary.at(x, positions)
        if embeddings[0].shape != (1, ids.shape[1], self._layers[0].head_dim):
            return None  # heads that are rotated in part
        plan = self._plans.make(step, embeddings, self._layers[0].sizes)
        if plan is None:
            return None
        y = torch.empty_like(x)
        self._kernels.layers(self._addresses, self._count, plan, x.data_ptr(), y.data_ptr(), self._memory_of(step))
        return self._norm(y if self._count % 2 else x)

    def _memory_of(self, step: PagedStep) -> ctypes.Array[ctypes.c_void_p]:
        """Addresses of the keys and the values of each layer in the step's cache."""
        if self._memory is None or self._cache is None or self._cache() is not step.cache:
            tensors = [tensor for layer in self._layers for tensor in step.cache.layer(layer.layer)]
            self._memory = (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
            self._cache = weakref.ref(step.cache)
        return self._memory
