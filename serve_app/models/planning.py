"""What one replica of a config would need, before anything is started: for `serve-app check` and for people.

Reads configs and file headers, loads no weights and asks for no GPU.
"""

from __future__ import annotations

import torch

from serve_app.config import ModelConfig
from serve_app.models.checkpoint import weight_files
from serve_app.models.loader import choose_context, choose_dtype
from serve_app.models.sizes import MemoryPlan, config_weights_bytes, kv_bytes_per_token, stored_weights_bytes
from serve_app.models.source import ModelFiles
from serve_app.models.support import built_in_class, check_architecture, read_config


def plan_replica(files: ModelFiles, model: ModelConfig, *, has_gpu: bool, kv_cache_bytes: int) -> MemoryPlan:
    """The memory of one replica with that much KV cache. `files` may lack the weights (`tokenizer_only`).

    Raises `ModelError` for what `load` would refuse by its config.
    """
    config = read_config(files.folder, files.name, trust_remote_code=model.trust_remote_code)
    if (built_in := built_in_class(config)) is not None:
        check_architecture(config, built_in)
    on_gpu = model.device == "cuda" or (model.device == "auto" and has_gpu)
    dtype = choose_dtype(config, model, torch.device("cuda" if on_gpu else "cpu"))
    if weight_files(files.folder):
        weights_bytes = stored_weights_bytes(files.folder, dtype, model.quantization)
    else:
        weights_bytes = config_weights_bytes(config, dtype, model.quantization)
    return MemoryPlan(weights_bytes, kv_cache_bytes, kv_bytes_per_token(config, dtype), choose_context(config, model))
