"""What a model needs: bytes of weights, and bytes of KV cache a token.

Pure functions of a config and file headers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve_app.models.checkpoint import TensorEntry, is_safetensors, tensors, weight_files

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_WEIGHT_BYTES = {"bnb-int8": 1.0, "bnb-nf4": 0.5625, "bnb-fp4": 0.5625}
"""Bytes of a quantised weight; in 4 bits each block of 64 has a float32 scale."""
_STORED_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What one replica of a model takes, and how much it can hold at once."""

    weights_bytes: int
    kv_cache_bytes: int
    kv_bytes_per_token: int
    context_tokens: int

    @property
    def total_bytes(self) -> int:
        """Weights and KV cache; activations and libraries come on top (some hundred MB)."""
        return self.weights_bytes + self.kv_cache_bytes

    @property
    def kv_capacity_tokens(self) -> int:
        """Tokens of cache over all requests, not rounded to pages."""
        return self.kv_cache_bytes // self.kv_bytes_per_token


def own_context_tokens(config: Any) -> int | None:
    """The context the model can serve; None when its config states none.

    YaRN stretches the original context by its factor, also where `max_position_embeddings` still states the original
    one (Qwen's cards have people add `rope_scaling` alone); vLLM does the same. transformers fills in a missing
    original context with `max_position_embeddings`. Configs with other kinds of scaling state the scaled context.
    """
    text = config.get_text_config()
    stated = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or {}
    scalings = [rope, *(value for value in rope.values() if isinstance(value, dict))]  # one, or one per kind of layer
    stretched = [
        int(scaling["original_max_position_embeddings"] * scaling["factor"])
        for scaling in scalings
        if scaling.get("rope_type") == "yarn" and scaling.get("factor")
    ]
    return max((int(stated or 0), *stretched)) or None


def kv_bytes_per_token(config: Any, dtype: str) -> int:
    """Layers x KV heads x head width x 2 (keys and values) x bytes of `dtype`; sliding layers count in full."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    if getattr(text, "multi_query", False):  # GPTBigCode's way to say one KV head
        kv_heads = 1
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return int(text.num_hidden_layers * kv_heads * width * 2 * DTYPE_BYTES[dtype])


def stored_weights_bytes(folder: Path, dtype: str, quantization: str = "none") -> int:
    """Bytes the folder's weights take once loaded in `dtype`, exact for safetensors; pickles by their file size."""
    total = 0.0
    for path in weight_files(folder):
        if is_safetensors(path):
            total += sum(_loaded_bytes(entry, dtype, quantization) for entry in tensors(path))
        else:
            total += path.stat().st_size
    return int(total)


def config_weights_bytes(
    config: Any, dtype: str, quantization: str = "none", *, trust_remote_code: bool = False
) -> int:
    """`stored_weights_bytes` from a config, for weights that are not on this machine: builds the model without storage.

    Raises what transformers and the model's code raise.
    """
    from serve_app.models.support import without_weights  # transformers' models, seconds of imports

    model = without_weights(config, trust_remote_code=trust_remote_code)
    entries = (TensorEntry(n, "F32", tuple(p.shape), 0, 0) for n, p in model.named_parameters())
    return int(sum(_loaded_bytes(entry, dtype, quantization) for entry in entries))


def _loaded_bytes(entry: TensorEntry, dtype: str, quantization: str) -> float:
    if not entry.is_float:
        return entry.numel * _STORED_BYTES.get(entry.dtype, 1)
    # bitsandbytes takes linear layers, but never the output head; embeddings are no linear layers.
    linear = len(entry.shape) == 2 and not any(part in entry.name for part in ("embed", "lm_head", "wte", "wpe"))
    held = _WEIGHT_BYTES.get(quantization) if linear else None
    return entry.numel * (held or DTYPE_BYTES[dtype])
