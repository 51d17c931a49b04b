"""What one replica of a config would need, before anything is started: for `serve-app check` and for people.

Reads configs and file headers, loads no weights and asks for no GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from serve_app.config import ModelConfig
from serve_app.home import expanded
from serve_app.models.cache import Progress
from serve_app.models.checkpoint import weight_files
from serve_app.models.gguf_files import gguf_parts, read_gguf
from serve_app.models.gguf_settings import gguf_config
from serve_app.models.loader import choose_context, choose_dtype, held_dtype
from serve_app.models.sizes import MemoryPlan, config_weights_bytes, kv_bytes_per_token, stored_weights_bytes
from serve_app.models.source import ModelFiles, SourceKind, own_name, source_kind
from serve_app.models.support import LOAD_ERRORS, check_config, explain, read_config

_DEMO_CONFIG: dict[str, Any] = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
"""What the demo model's size follows from. It has no config before its GGUF is converted."""


def plan_replica(files: ModelFiles | None, model: ModelConfig, *, has_gpu: bool, kv_cache_bytes: int) -> MemoryPlan:
    """The memory of one replica with that much KV cache.

    `files` may lack the weights; None for the demo model or a GGUF file that is not converted yet.

    Raises `ModelError` for what `load` would refuse by its config.
    """
    if files is not None:
        config = read_config(files.folder, files.name, trust_remote_code=model.trust_remote_code)
    else:
        config = _config_before_conversion(model)
        check_config(config)
    on_gpu = model.device == "cuda" or (model.device == "auto" and has_gpu)
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype = choose_dtype(config, model, device)
    held = dtype if files is None else held_dtype(files.folder, config, model, device, dtype)
    if files is not None and weight_files(files.folder):
        weights_bytes = stored_weights_bytes(files.folder, held, model.quantization)
    else:
        try:
            weights_bytes = config_weights_bytes(
                config, held, model.quantization, trust_remote_code=model.trust_remote_code
            )
        except LOAD_ERRORS as error:
            raise explain(model.source, files.folder if files is not None else Path(model.source), error) from error
    return MemoryPlan(weights_bytes, kv_cache_bytes, kv_bytes_per_token(config, dtype), choose_context(config, model))


def fetch_settings(model: ModelConfig, progress: Progress) -> ModelFiles:
    """Config and tokenizer of a model on the hub, from Hugging Face's cache where the hub can't be reached.

    Raises `ModelError`.
    """
    from serve_app.models import hub  # seconds of imports that no other source needs

    folder, revision = hub.fetch(model, tokenizer_only=True, progress=progress)
    name = model.served_model_name or own_name(model.source, SourceKind.HUB)
    return ModelFiles(folder, folder, name, SourceKind.HUB, revision)


def _config_before_conversion(model: ModelConfig) -> Any:
    if source_kind(model.source) is SourceKind.DEMO:
        return LlamaConfig(**_DEMO_CONFIG)
    parts = gguf_parts(expanded(model.source))
    gguf = parts[0]
    try:
        return gguf_config(gguf, read_gguf(parts))
    except LOAD_ERRORS as error:
        raise explain(gguf.name, gguf, error) from error
