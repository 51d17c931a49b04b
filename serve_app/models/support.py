"""Which architectures can be served, as far as a config and a class can tell, without any weights.

Promises a refusal by name for what the engine would compute wrongly: it keeps one paged cache of keys and values and
computes attention through transformers' AttentionInterface. The engine checks by computing, in addition.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, AutoConfig, AutoModelForCausalLM

from serve_app.models.model_error import ModelError
from serve_app.transformers_internals import is_recurrent, uses_attention_interface

LOAD_ERRORS = (
    ValueError,
    KeyError,
    OSError,
    ImportError,
    TypeError,
    AttributeError,
    RuntimeError,
    EOFError,
    UnpicklingError,
    StrictDataclassError,
)
"""What transformers and the libraries below it raise for a folder they can't load."""
_SAID_CHARACTERS = 300
_SERVED_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
_OF_EACH_LAYER = "of each layer"


def read_config(folder: Path, name: str, *, trust_remote_code: bool) -> Any:
    """The transformers config in `folder`. Raises `ModelError`, with the setting to change if there is one.

    What `check_config` refuses is refused here.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except LOAD_ERRORS as error:
        raise explain(name, folder, error) from error
    check_config(config)
    return config


def check_config(config: Any) -> None:
    """Raise `ModelError` when transformers' own class for this config can't be served.

    A class that comes with the model is checked once it is loaded.
    """
    if (built_in := built_in_class(config)) is not None:
        check_architecture(config, built_in)


def without_weights(config: Any, *, trust_remote_code: bool = False) -> Any:
    """The model of a config with no memory for its weights. Raises what transformers and the model's code raise."""
    factory: Any = AutoModelForCausalLM  # its methods carry no types
    with torch.device("meta"):
        return factory.from_config(config, trust_remote_code=trust_remote_code)


def built_in_class(config: Any) -> type[Any] | None:
    """The class transformers would load for `config`; None when the model brings its own code.

    Raises `ModelError` when transformers knows the config but no causal language model for it.
    """
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        return found[0] if isinstance(found, tuple) else found
    if getattr(config, "auto_map", None):
        return None
    kind = "an encoder-decoder model" if config.is_encoder_decoder else "no causal language model"
    raise ModelError(f"{config.model_type} can't be served: it is {kind}, and only text decoders are served.")


def check_architecture(config: Any, model_class: type[Any]) -> None:
    """Raise `ModelError`, naming the class and the reason, when this transformers config and class can't be served."""
    for reason, holds in _reasons(config, model_class):
        if holds:
            raise ModelError(f"{model_class.__name__} ({config.model_type}) can't be served: {reason}.")


def explain(name: str, folder: Path, error: Exception) -> ModelError:
    """The `ModelError` for an exception of transformers, as one sentence."""
    said = " ".join(str(error).split())[:_SAID_CHARACTERS] or type(error).__name__
    if "trust_remote_code" in str(error):
        return ModelError(
            f"{name} comes with its own Python code; read it, and if you trust it set model.trust_remote_code: true."
        )
    if "does not recognize this architecture" in str(error) or "Unrecognized model" in said:
        return ModelError(
            f"{name} has an architecture that this version of transformers doesn't know; upgrade transformers, "
            "or use another model."
        )
    return ModelError(f"{name} can't be loaded from {folder}: {said}")


def _reasons(config: Any, model_class: type[Any]) -> Iterator[tuple[str, Any]]:
    """Each reason for a refusal, and whether it holds. Later ones read fields that a config refused before may lack."""
    yield "it is an encoder-decoder model, and only text decoders are served", config.is_encoder_decoder
    text = config.get_text_config()
    senses = (getattr(config, name, None) for name in ("vision_config", "audio_config"))
    multimodal = text is not config or any(sense is not None for sense in senses)
    yield "it reads images or sound; only text models are served", multimodal
    yield "it keeps a recurrent state, which has no place in a paged cache", is_recurrent(model_class)
    other_layers = sorted(set(getattr(text, "layer_types", None) or ()) - _SERVED_LAYER_TYPES)
    yield f"it has layers of type {', '.join(other_layers)}", other_layers
    chunked = getattr(text, "attention_chunk_size", None) and not hasattr(text, "layer_types")
    yield "its attention is chunked", chunked
    # BERT and its kin are masked language models that `is_decoder` turns into causal ones.
    encoder = type(text) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(text, "is_decoder", False)
    yield "its attention reads in both directions", encoder
    yield "its keys and values have different widths (latent attention)", _field(text, "kv_lora_rank")
    yield "its layers share keys and values", getattr(text, "num_kv_shared_layers", 0)
    yield "its heads differ in width between layers", _differs(text, "global_head_dim", "head_dim")
    supported = uses_attention_interface(model_class)
    yield "it doesn't compute attention through transformers' AttentionInterface", not supported


def _field(config: Any, name: str) -> Any:
    """A field of the config; None where it lacks it, `_OF_EACH_LAYER` where each layer has its own (RuntimeError)."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return _OF_EACH_LAYER


def _differs(config: Any, first: str, second: str) -> bool:
    one, other = _field(config, first), _field(config, second)
    return _OF_EACH_LAYER in (one, other) or (one is not None and one != other)
