"""Fixes rotary embeddings that transformers would change while it computes, by the context that is to be served.

LongRoPE (arXiv 2402.13753; Phi-3 and 4) has two sets of angles, for contexts of the original length and for longer
ones. transformers chooses by the longest position in a step: one request would change the angles of all others, and
cached keys could have been computed with either set. Knows no engine.
"""

from __future__ import annotations

from typing import Any

from transformers import ROPE_INIT_FUNCTIONS, PreTrainedModel

from serve_app.models.model_error import ModelError


def choose_angles(config: Any, context_tokens: int, name: str) -> str:
    """`short` or `long`; empty without LongRoPE. Raises `ModelError` where the model's own code chooses."""
    parameters = _longrope(config)
    if parameters is None:
        return ""
    original = _original_tokens(config)
    if context_tokens <= original:
        return "short"
    if "long_mscale" in parameters:  # PhiMoE
        raise _chooses_itself(name, original)
    return "long"


def settle_angles(loaded: PreTrainedModel, angles: str, name: str) -> tuple[str, ...]:
    """Have the model use these angles and no others; returns notes for the user. Raises `ModelError`."""
    if angles != "long":  # modules begin with the short angles and change them only for longer positions
        return ()
    original = _original_tokens(loaded.config)
    modules: list[Any] = [module for module in loaded.modules() if getattr(module, "rope_type", None) == "longrope"]
    if not modules:
        raise _chooses_itself(name, original)
    for module in modules:
        computed, _ = ROPE_INIT_FUNCTIONS["longrope"](module.config, module.inv_freq.device, seq_len=original + 1)
        module.inv_freq.copy_(computed)
        module.rope_type = "default"
    return (
        f"LongRoPE with its angles for more than {original:,} tokens, for short prompts too; model.max_model_len: "
        f"{original} has it use the others",
    )


def _longrope(config: Any) -> dict[str, Any] | None:
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)
    if not isinstance(parameters, dict):
        return None
    kind = parameters.get("rope_type", parameters.get("type"))
    return parameters if kind == "longrope" else None


def _original_tokens(config: Any) -> int:
    text = config.get_text_config()
    original = (_longrope(text) or {}).get("original_max_position_embeddings")
    return int(original or getattr(text, "original_max_position_embeddings", 0) or text.max_position_embeddings)


def _chooses_itself(name: str, original: int) -> ModelError:
    return ModelError(
        f"{name} chooses its rotary angles by the longest text in a batch, so one request would change the answer of "
        f"another; set model.max_model_len to {original} or less."
    )
