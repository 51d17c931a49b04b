"""Gives modules the fused forwards of `forwards.py`, `layer.py` and `stack.py` where those are right.

A module is recognised by its parts, not by its model's name. It keeps its own forward unless the fused one gives the
same numbers for random inputs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from serve_app.engine.attention.base import ATTENTION_NAME, STEP_KEYWORD, AttentionParams, PagedStep, Span
from serve_app.engine.cpu.attention import CpuAttention
from serve_app.engine.cpu.forwards import FusedAttention, FusedGatedMLP, FusedNorm
from serve_app.engine.cpu.layer import FusedLayer, StepPlans
from serve_app.engine.cpu.library import Kernels
from serve_app.engine.cpu.linear import PackedLinear
from serve_app.engine.cpu.stack import FusedStack
from serve_app.engine.cpu.widen import WideEmbedding
from serve_app.engine.kv_cache import KVCache, LayerShape

logger = logging.getLogger(__name__)

_CHECKED_TOKENS = 7
_CHECKED_STRIDE = 97
"""Distance between the positions in the check of a whole model, so that distant angles are compared too."""
_TOLERANCE = 1e-5
"""Largest |a - b| / |b| against the module's own forward. Float32 rounding gives about 1e-7, another formula 1e-3."""
_ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
"""At each index, the activation of that number in the kernels. Each is tried, to find the one that a module has."""

Forward = Callable[..., Any]


class _Unsuitable(Exception):
    """This module can't be fused; the message says why. Its own forward serves."""


class _Recorder:
    """An attention step that records its arguments and returns noise."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, params: AttentionParams
    ) -> torch.Tensor:
        self.layer, self.params = layer, params
        self.inputs = tuple(tensor.clone() for tensor in (query, key, value))
        return _noise(1, query.shape[2], query.shape[1], value.shape[3], seed=1)


@torch.inference_mode()
def fuse_modules(model: PreTrainedModel, kernels: Kernels) -> dict[str, int]:
    """Give the model's modules fused forwards where those are right; returns how many of each kind.

    The linear layers must be packed already. The model's attention implementation becomes the paged one.
    """
    model.set_attn_implementation(ATTENTION_NAME)
    plans = StepPlans()
    kinds: tuple[tuple[str, Callable[[nn.Module], Forward | None]], ...] = (
        ("norms", lambda module: _norm(module, kernels)),
        ("MLPs", lambda module: _gated_mlp(module, kernels)),
        ("attention modules", lambda module: _attention(module, kernels)),
        ("layers", lambda module: _layer(module, kernels, plans)),
        ("stacks", lambda module: _stack(module, kernels, plans)),
    )
    fused = dict.fromkeys((kind for kind, _ in kinds), 0)
    for kind, make in kinds:
        for name, module in model.named_modules():
            if hasattr(module, "_hf_hook"):
                continue
            try:
                forward = make(module)
            except _Unsuitable as reason:
                logger.info("%s is not fused: %s", name, reason)
                continue
            if forward is not None:
                module.forward = forward
                fused[kind] += 1
    return fused


def _noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _agree(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).norm() <= _TOLERANCE * b.norm())


def _norm(module: nn.Module, kernels: Kernels) -> Forward | None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weights = dict(module.named_parameters())
    if not isinstance(eps, float) or list(weights) != ["weight"] or weights["weight"].dim() != 1:
        return None
    weight = weights["weight"].detach()
    # The mean is not 0, which shows norms that subtract it. In the last row eps matters.
    x = (_noise(3, len(weight)) + 0.5) * torch.tensor([[1.0], [30.0], [eps**0.5]])
    expected = module(x)
    for scale in (weight, 1 + weight):  # Gemma's weights are differences from 1
        fused = FusedNorm(kernels, scale, eps)
        if all(_agree(*rows) for rows in zip(fused(x), expected, strict=True)):
            return fused
    raise _Unsuitable(f"{type(module).__name__} is another norm")


def _gated_mlp(module: nn.Module, kernels: Kernels) -> Forward | None:
    if (linears := _linears(module, "gate_proj", "up_proj", "down_proj")) is None:
        return None
    gate, up, down = linears
    _require_one_width("its input", gate.in_features, up.in_features)
    _require_one_width("what is between its products", gate.out_features, up.out_features, down.in_features)
    x = _noise(_CHECKED_TOKENS, gate.in_features)
    x *= 2 / gate(x).abs().mean()  # values around -2 and 2, where the activations are not linear
    expected = module(x)
    for activation in range(len(_ACTIVATIONS)):
        fused = FusedGatedMLP(kernels, gate, up, down, activation)
        if _agree(fused(x), expected):
            return fused
    raise _Unsuitable(f"{type(module).__name__} is more than a gated MLP with one of {', '.join(_ACTIVATIONS)}")


def _attention(module: nn.Module, kernels: Kernels) -> Forward | None:
    linears = _linears(module, "q_proj", "k_proj", "v_proj", "o_proj")
    if linears is None or not hasattr(module, "head_dim"):
        return None
    norms = [getattr(module, name).forward for name in ("q_norm", "k_norm") if hasattr(module, name)]
    if not all(isinstance(norm, FusedNorm) for norm in norms):
        raise _Unsuitable("the norms of its queries and keys are of another kind")
    own, head_dim = module.forward, int(module.head_dim)  # type: ignore[arg-type]
    if any(norm.scale.numel() != head_dim for norm in norms):
        raise _Unsuitable("the norms of its queries and keys are not of single heads")
    query, key, value, output = linears
    _require_one_width("its input", *(linear.in_features for linear in (query, key, value)))
    _require_one_width("what its heads answer", query.out_features, output.in_features)
    if query.out_features % key.out_features:
        raise _Unsuitable("its heads of queries are no multiple of those of keys")
    x, embeddings = _inputs(query.in_features, head_dim)

    def outcome(forward: Forward) -> tuple[_Recorder, torch.Tensor]:
        recorder = _Recorder()
        keywords = {"position_embeddings": embeddings, "attention_mask": None, STEP_KEYWORD: recorder}
        result = forward(hidden_states=x.clone(), **keywords)
        return recorder, result[0] if isinstance(result, tuple) else result

    try:
        recorded, expected = outcome(own)
        fused = FusedAttention(kernels, module, own, recorded.params)
        found, result = outcome(fused)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise _Unsuitable(f"{type(module).__name__} is called in another way ({error})") from error
    pairs = [*zip(found.inputs, recorded.inputs, strict=True), (result, expected)]
    if (found.layer, found.params) != (recorded.layer, recorded.params) or not all(_agree(*pair) for pair in pairs):
        raise _Unsuitable(f"{type(module).__name__} does more than what is fused")
    return fused


def _layer(module: nn.Module, kernels: Kernels, plans: StepPlans) -> Forward | None:
    names = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
    parts: dict[str, Any] = dict(module.named_children())
    if set(parts) != names or next(module.parameters(recurse=False), None) is not None:
        return None
    kinds = (FusedNorm, FusedAttention, FusedGatedMLP)
    if not all(isinstance(part.forward, kinds) for part in parts.values()):
        return None
    attention: FusedAttention = parts["self_attn"].forward
    dim = attention.head_dim
    if attention.projections[1].out_features != attention.projections[2].out_features:
        raise _Unsuitable("its values are of another size than its keys")
    mlp: FusedGatedMLP = parts["mlp"].forward
    _require_one_width(
        "its hidden state",
        *(parts[name].forward.scale.numel() for name in ("input_layernorm", "post_attention_layernorm")),
        *(attention.projections[0].in_features, attention.output.out_features),
        *(mlp.gate.in_features, mlp.down.out_features),
    )
    fused = FusedLayer(kernels, module, module.forward, plans)
    shape = fused.shape
    if (refusal := CpuAttention.refusal(shape, attention.params)) is not None:
        raise _Unsuitable(refusal)
    x, embeddings = _inputs(attention.projections[0].in_features, dim)

    def outcome(forward: Forward) -> torch.Tensor:
        keywords = {STEP_KEYWORD: _checked_step(kernels, {attention.layer: shape})}
        result: Any = forward(x.clone(), position_embeddings=embeddings, attention_mask=None, **keywords)
        return result  # type: ignore[no-any-return]

    expected = outcome(module.forward)
    if not isinstance(expected, torch.Tensor) or not _agree(outcome(fused), expected):
        raise _Unsuitable(f"{type(module).__name__} does more than what is fused")
    return fused


def _stack(module: nn.Module, kernels: Kernels, plans: StepPlans) -> Forward | None:
    parts: dict[str, Any] = dict(module.named_children())
    if set(parts) != {"embed_tokens", "layers", "norm", "rotary_emb"} or type(parts["embed_tokens"]) not in (
        nn.Embedding,
        WideEmbedding,
    ):
        return None
    layers = [layer.forward for layer in parts["layers"]]
    if not layers or not all(isinstance(layer, FusedLayer) for layer in layers):
        return None
    if not isinstance(parts["norm"].forward, FusedNorm) or any(hasattr(part, "_hf_hook") for part in parts.values()):
        return None
    if len({(layer.sizes, layer.head_dim) for layer in layers}) != 1:
        raise _Unsuitable("its layers are of different sizes")
    ids = torch.arange(_CHECKED_TOKENS) % parts["embed_tokens"].num_embeddings
    positions = torch.arange(_CHECKED_TOKENS) * _CHECKED_STRIDE
    width = parts["embed_tokens"](ids[:1]).shape[-1]
    _require_one_width("its hidden state", width, layers[0].sizes[0], parts["norm"].forward.scale.numel())
    fused = FusedStack(kernels, module, module.forward, plans)

    def outcome(forward: Forward) -> torch.Tensor:
        step = _checked_step(kernels, {layer.layer: layer.shape for layer in layers})
        result = forward(input_ids=ids[None], position_ids=positions[None], use_cache=False, **{STEP_KEYWORD: step})
        return result.last_hidden_state  # type: ignore[no-any-return]

    try:
        expected = outcome(module.forward)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise _Unsuitable(f"{type(module).__name__} is called in another way ({error})") from error
    if not _agree(outcome(fused), expected):
        raise _Unsuitable(f"{type(module).__name__} does more than what is fused")
    return fused


def _require_one_width(what: str, *widths: int) -> None:
    """Raise _Unsuitable unless all are equal: the kernels take one part's width for all, and would overrun others."""
    if len(set(widths)) > 1:
        raise _Unsuitable(f"{what} is of several widths ({', '.join(map(str, widths))})")


def _checked_step(kernels: Kernels, layers: dict[int, LayerShape]) -> PagedStep:
    """One sequence from its start, in an empty cache of these layers."""
    span = Span(0, _CHECKED_TOKENS, _CHECKED_TOKENS, ((0, _CHECKED_TOKENS),), (0,))
    cache = KVCache(layers, 1, CpuAttention.page_tokens)
    return PagedStep(CpuAttention(kernels), cache, [span], torch.arange(_CHECKED_TOKENS))


def _inputs(inner: int, head_dim: int) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Hidden states `[1, tokens, inner]`, and noise in place of cosines and sines."""
    embeddings = tuple(_noise(1, _CHECKED_TOKENS, head_dim, seed=seed) for seed in (2, 3))
    return _noise(1, _CHECKED_TOKENS, inner), embeddings


def _linears(module: nn.Module, *names: str) -> list[PackedLinear] | None:
    found = [linear for name in names if isinstance(linear := getattr(module, name, None), PackedLinear)]
    return found if len(found) == len(names) else None
