"""Settings of a GGUF file that transformers' reader drops: they are carried into the config, or refused by name.

transformers drops every key and tensor that its table of the architecture does not list, and takes the defaults of the
config's class instead: other rotary angles, another window, another epsilon, and so other answers. Keys:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; what they mean: llama.cpp, src/llama-model.cpp.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from serve_app.models.gguf_files import GGUFContents
from serve_app.models.model_error import ModelError
from serve_app.transformers_internals import gguf_settings_read

ROPE_TENSORS = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})
"""Tensors that hold no weights, but the divisors of the rotary frequencies."""

_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
"""Names that transformers' configs have for the epsilon of a model's norms; a config has one of them."""
_ATTRIBUTES = {
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "expert_weights_norm": "norm_topk_prob",
    "use_parallel_residual": "use_parallel_residual",
}
"""GGUF key -> the config's attribute that takes its value as it is, where the config has that attribute."""
_SCALING = "rope.scaling."
_OTHER_ROPE = frozenset({"rope.dimension_count", "rope.freq_base", "rope.freq_base_swa", "rope.scale_linear"})
_WITHOUT_EFFECT = frozenset({"tensor_data_layout", "rope.scaling.finetuned", "attention.causal"})
"""Keys that need no place in the config. `_carry_attention` refuses an `attention.causal` that is not true."""
_NEUTRAL = (0, 1)
"""Values that turn an unknown setting off: no experts, no bias, a scale of one."""
_QUERIES_BY_WIDTH = frozenset({46, 62})
"""Numbers of layers of Gemma 2 27B and Gemma 3 27B. Their queries are scaled by hidden size / heads, not by the width
of a head; the file doesn't say so (llama.cpp, src/models/gemma2.cpp and gemma3.cpp)."""
_SAMPLING = {
    "temp": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
"""Keys under `general.sampling.`, and what generation_config.json calls them."""
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Rotary parameters of every Llama 3.1, 3.2 and 3.3. The file holds only the divisors that result from them."""


def gguf_config(gguf: Path, contents: GGUFContents) -> Any:
    """The transformers config of a model in `gguf` (of several parts, the first), with all that its file says.

    Raises `ModelError` for what transformers has no place for, and what transformers raises.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    if len(contents.readers) > 1:  # transformers looks for the output layer in the one file that it is given
        config.tie_word_embeddings = all(tensor.name != "output.weight" for tensor in contents.tensors)
    carry_settings(gguf.name, contents, config)
    return config


def carry_settings(name: str, contents: GGUFContents, config: Any) -> None:
    """Complete the transformers `config` of the GGUF file `name`. Raises `ModelError` for what it has no place for."""
    architecture = contents.architecture
    own = {
        key.removeprefix(f"{architecture}."): value
        for key, value in contents.fields.items()
        if key.startswith(f"{architecture}.")
    }
    taken = gguf_settings_read(config.model_type, architecture)
    taken |= (
        _carry_attributes(own, config) | _carry_attention(name, own, config) | _carry_rope(name, own, contents, config)
    )
    for key, value in sorted(own.items()):
        if key not in taken and key not in _WITHOUT_EFFECT and value not in _NEUTRAL:
            raise _no_place(name, key, value)


def sampling_settings(contents: GGUFContents) -> dict[str, float]:
    """The file's sampling settings as generation_config.json names them; empty for the many files without any."""
    found = {key: contents.fields.get(f"general.sampling.{key}") for key in _SAMPLING}
    settings = {_SAMPLING[key]: shortest_decimal(value) for key, value in found.items() if value is not None}
    return {"do_sample": True, **settings} if settings else {}  # without `do_sample` transformers writes none


def shortest_decimal(value: float) -> float:
    """Undoes GGUF's rounding to float32: 9.999999747378752e-06 becomes 1e-05. An integer stays one."""
    return value if isinstance(value, int) else float(str(np.float32(value)))


def _carry_attributes(own: Mapping[str, Any], config: Any) -> set[str]:
    taken = set()
    for key, attribute in _ATTRIBUTES.items():
        if key in own and hasattr(config, attribute):
            setattr(config, attribute, shortest_decimal(own[key]))
            taken.add(key)
    epsilon = next((name for name in _EPSILONS if hasattr(config, name)), None)
    for key in ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"):
        if key in own and epsilon is not None:
            setattr(config, epsilon, shortest_decimal(own[key]))
            taken.add(key)
    return taken


def _carry_attention(name: str, own: Mapping[str, Any], config: Any) -> set[str]:
    """Widths, window and scale of attention. Raises `ModelError` for what a config can't say."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    widths = [f"attention.{key}" for key in ("key_length", "value_length", "key_length_swa", "value_length_swa")]
    for key in widths:
        if own.get(key, width) != width:
            raise _no_place(name, key, own[key])
    if own.get("attention.causal", True) is not True:
        raise _no_place(name, "attention.causal", own["attention.causal"])
    if own.get("attention.sliding_window") and getattr(config, "use_sliding_window", True) is not True:
        raise _no_place(name, "attention.sliding_window", own["attention.sliding_window"])
    _carry_window_pattern(own, config)
    scale = own.get("attention.scale")
    if hasattr(config, "query_pre_attn_scalar"):
        by_width = config.num_hidden_layers in _QUERIES_BY_WIDTH
        usual = config.hidden_size // config.num_attention_heads if by_width else width
        config.query_pre_attn_scalar = shortest_decimal(scale**-2) if scale else usual
    elif scale and not math.isclose(scale, width**-0.5, rel_tol=1e-5):
        raise _no_place(name, "attention.scale", scale)
    pattern = {"attention.sliding_window_pattern"} if getattr(config, "layer_types", None) else set()
    return {*widths, "attention.scale"} | pattern


def _carry_window_pattern(own: Mapping[str, Any], config: Any) -> None:
    """Set which layers attend to a window only. The pattern is a number n (all but each n-th) or one bool a layer."""
    pattern = own.get("attention.sliding_window_pattern")
    if pattern is None or not getattr(config, "layer_types", None):
        return
    layers = range(config.num_hidden_layers)
    windowed = pattern if isinstance(pattern, list) else [(layer + 1) % pattern != 0 for layer in layers]
    config.layer_types = ["sliding_attention" if windowed[layer] else "full_attention" for layer in layers]


def _carry_rope(name: str, own: Mapping[str, Any], contents: GGUFContents, config: Any) -> set[str]:
    """Set the rotary angles in `config.rope_parameters`. Raises `ModelError` for what transformers can't express."""
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return set()
    full, sliding = rope.get("full_attention", rope), rope.get("sliding_attention")
    if "rope.freq_base" in own:
        full["rope_theta"] = shortest_decimal(own["rope.freq_base"])
    if "rope.freq_base_swa" in own:
        if sliding is None and own["rope.freq_base_swa"] != own.get("rope.freq_base"):
            raise _no_place(name, "rope.freq_base_swa", own["rope.freq_base_swa"])
        (sliding or full)["rope_theta"] = shortest_decimal(own["rope.freq_base_swa"])
    _carry_rotated_width(name, own, full, config)
    full.update(_scaling(name, own, contents, config) or {})
    if full["rope_type"] == "longrope" and hasattr(config, "original_max_position_embeddings"):  # Phi-3's place for it
        config.original_max_position_embeddings = full["original_max_position_embeddings"]
    config.standardize_rope_params()
    config.validate_rope()
    return {key for key in own if key.startswith(_SCALING)} | _OTHER_ROPE


def _carry_rotated_width(name: str, own: Mapping[str, Any], rope: dict[str, Any], config: Any) -> None:
    """Set the part of each head's width that is rotated. Raises `ModelError` where a config has no place for it."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotated = own.get("rope.dimension_count", width)
    if rotated == width * rope.get("partial_rotary_factor", 1.0):
        return
    if "partial_rotary_factor" not in rope:
        raise _no_place(name, "rope.dimension_count", rotated)
    rope["partial_rotary_factor"] = rotated / width


def _scaling(name: str, own: Mapping[str, Any], contents: GGUFContents, config: Any) -> dict[str, Any] | None:
    """Rotary scaling in the form of transformers' `rope_parameters`; None for none. Raises `ModelError`."""
    said = {key.removeprefix(_SCALING): value for key, value in own.items() if key.startswith(_SCALING)}
    factor = shortest_decimal(said.get("factor") or own.get("rope.scale_linear") or 0.0)
    kind = said.get("type") or ("linear" if factor else "none")
    original = said.get("original_context_length") or config.max_position_embeddings
    divisors = {
        tensor.name: tensor.data.astype(np.float32) for tensor in contents.tensors if tensor.name in ROPE_TENSORS
    }
    if "rope_factors_long.weight" in divisors:
        if set(divisors) != {"rope_factors_long.weight", "rope_factors_short.weight"}:
            raise ModelError(f"{name} has only one of LongRoPE's two sets of factors; fetch the model again.")
        found = _longrope(divisors["rope_factors_short.weight"], divisors["rope_factors_long.weight"], original)
        return found | ({"attention_factor": said["attn_factor"]} if said.get("attn_factor") else {})
    if "rope_freqs.weight" in divisors:
        if kind != "none" and factor not in _NEUTRAL:
            raise _no_place(name, "rope.scaling.type", kind)
        return _divided(divisors["rope_freqs.weight"], config)
    for key, value in said.items():
        known = ("type", "factor", "original_context_length", "finetuned", "yarn_beta_fast", "yarn_beta_slow")
        if key not in known and value not in (*_NEUTRAL, -1):
            raise _no_place(name, f"{_SCALING}{key}", value)
    if kind == "none" or (kind == "linear" and factor in _NEUTRAL):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        betas = {beta: said[f"yarn_{beta}"] for beta in ("beta_fast", "beta_slow") if said.get(f"yarn_{beta}")}
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, **betas}
    raise _no_place(name, "rope.scaling.type", kind)


def _divided(divisors: np.ndarray[Any, Any], config: Any) -> dict[str, Any]:
    """Rotary parameters that divide each frequency by `divisors`: Llama 3's, where they give these very divisors, else
    LongRoPE with `divisors` as both of its sets."""
    from transformers import ROPE_INIT_FUNCTIONS

    llama3 = {"rope_type": "llama3", "factor": shortest_decimal(divisors.max()), **_LLAMA3}
    usual, tried = copy.deepcopy(config), copy.deepcopy(config)
    usual.rope_parameters = {**config.rope_parameters, "rope_type": "linear", "factor": 1.0}
    tried.rope_parameters = {**config.rope_parameters, **llama3}
    frequencies = ROPE_INIT_FUNCTIONS["linear"](usual)[0] / ROPE_INIT_FUNCTIONS["llama3"](tried)[0]
    if divisors.shape == tuple(frequencies.shape) and np.allclose(divisors, frequencies.numpy(), rtol=1e-5, atol=0):
        return llama3
    return _longrope(divisors, divisors, config.max_position_embeddings) | {"attention_factor": 1.0}


def _longrope(short: np.ndarray[Any, Any], long: np.ndarray[Any, Any], original: int) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "short_factor": [float(value) for value in short],
        "long_factor": [float(value) for value in long],
        "original_max_position_embeddings": original,
    }


def _no_place(name: str, key: str, value: Any) -> ModelError:
    return ModelError(
        f"{name} sets {key} to {value!r}, which transformers does not support for this architecture. Without it the "
        "model's answers would be wrong; use the original checkpoint."
    )
