"""Every private name of transformers that this project uses, each behind one small function.

A name is private if it begins with an underscore or if transformers' documentation does not mention it.
tests/test_transformers_internals.py checks each name on the installed version, and that no other module uses one.
transformers is imported when a function is called: some of its modules need torch, which a process that only handles
text does without.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def render_template(template: str, messages: Sequence[Mapping[str, object]], variables: Mapping[str, object]) -> str:
    """The text that a chat template makes of the messages of one conversation, in transformers' sandbox.

    `apply_chat_template` is public, but belongs to a tokenizer, which each call changes: threads can't share it.
    Raises what Jinja and the template raise.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    render: Any = render_jinja_template  # its annotations fit neither these arguments nor its result
    texts, _ = render([[dict(message) for message in messages]], chat_template=template, **variables)
    return str(texts[0])


def compiled_response_template(template: Mapping[str, object]) -> Any:
    """A checkpoint's response template, validated, with its regular expressions compiled. Raises ValueError."""
    from transformers.utils.chat_parsing.response_templates import load_response_template

    return load_response_template(dict(template))


def response_field_value(text: str, field: Any, captures: Mapping[str, str]) -> Any:
    """What a field of a compiled response template makes of the text of its region; None if it can't read it."""
    from transformers.utils.chat_parsing.content_parsers import process_field

    try:
        return process_field(text, field, dict(captures))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):  # whatever a model wrote
        return None


def attention_name(config: Any) -> str:
    """The attention implementation that a loaded model's config was given."""
    return str(config._attn_implementation)


def has_sdpa(model_class: type[Any] | None) -> bool:
    """Whether a model's class can compute attention with torch's scaled_dot_product_attention."""
    return bool(getattr(model_class, "_supports_sdpa", False))


def uses_attention_interface(model_class: type[Any]) -> bool:
    """Whether a model's class computes attention through `AttentionInterface`, where the engine puts its own."""
    return bool(getattr(model_class, "_supports_attention_backend", False))


def is_recurrent(model_class: type[Any]) -> bool:
    """Whether a model's class keeps a state beside keys and values."""
    return bool(getattr(model_class, "_is_stateful", False))


def gguf_settings_read(model_type: str, architecture: str) -> set[str]:
    """The keys of a GGUF file's header, without its architecture's prefix, that transformers puts into a config."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    tables: Any = GGUF_CONFIG_MAPPING
    mapped = tables.get(model_type) or tables.get(architecture) or {}
    return {key for key, attribute in mapped.items() if attribute is not None}


def reports_gguf_tensors(architecture: str) -> bool:
    """Whether transformers reads GGUF files of this architecture with the newer of its two readers.

    Only the newer reader's loading report names every tensor that a file lacks or that the model has no place for.
    """
    from transformers.integrations.gguf.utils import is_gguf_arch_supported

    return bool(is_gguf_arch_supported(architecture))


def gguf_tensor_names(model: Any, architecture: str) -> dict[str, str]:
    """Name in a GGUF file -> name of the model's parameter, as transformers' older GGUF reader maps them."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    processor: Any = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
    return dict(get_gguf_hf_weights_map(model, processor(config={})))
