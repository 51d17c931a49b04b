"""Files to a transformers model in memory, ready for the engine, or one sentence why not.

Promises the weights are held once: on a CPU in the checkpoint's own dtype they stay memory-mapped, so replicas on one
machine share them; that none is left at random; and that nothing which can't be served comes through.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from serve_app.config import ModelConfig
from serve_app.memory import available_memory_bytes
from serve_app.messages import Fingerprint, LoadStage
from serve_app.models.cache import Progress
from serve_app.models.checkpoint import is_pickle, weight_files
from serve_app.models.errors import ModelError
from serve_app.models.fingerprint import fingerprint
from serve_app.models.quantization import held_bytes, quantization_config, settle
from serve_app.models.sizes import DTYPE_BYTES, own_context_tokens, stored_weights_bytes
from serve_app.models.source import ModelFiles
from serve_app.models.support import LOAD_ERRORS, built_in_class, check_architecture, explain, read_config

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory, in eval mode and without gradients, and what is known of it."""

    model: PreTrainedModel
    fingerprint: Fingerprint
    name: str
    context_tokens: int
    """Longest prompt plus output: the model's own, or less by `max_model_len`."""
    weights_bytes: int
    device: torch.device
    """Where ids go in; with a device map, the first part's."""
    dtype: torch.dtype
    """Of activations and so of keys and values; quantised weights are smaller."""
    notes: tuple[str, ...]


def load(files: ModelFiles, model: ModelConfig, *, has_gpu: bool, progress: Progress) -> LoadedModel:
    """Load the weights in `files` as `model` says. `has_gpu` is whether this replica was given one.

    Raises `ModelError`.
    """
    config = read_config(files.folder, files.name, trust_remote_code=model.trust_remote_code)
    if (built_in := built_in_class(config)) is not None:
        check_architecture(config, built_in)
    device = choose_device(model, has_gpu=has_gpu)
    dtype = choose_dtype(config, model, device)
    context_tokens = choose_context(config, model)
    needed = stored_weights_bytes(files.folder, dtype, model.quantization)
    _require_memory(files.name, needed, device)
    progress(LoadStage(f"loading weights ({needed / 1e9:.1f} GB, {dtype})"))
    loaded = _from_pretrained(files, model, config, device, _DTYPES[dtype])
    check_architecture(config, type(loaded))
    loaded.train(False).requires_grad_(False)
    notes = files.notes if model.quantization == "none" else (*files.notes, *settle(loaded, model))
    progress(LoadStage("fingerprinting weights"))
    return LoadedModel(
        model=loaded,
        fingerprint=fingerprint(files.folder, files.tokenizer_folder, model, dtype),
        name=files.name,
        context_tokens=context_tokens,
        weights_bytes=held_bytes(loaded),
        device=next(loaded.parameters()).device,
        dtype=_DTYPES[dtype],
        notes=notes,
    )


def choose_device(model: ModelConfig, *, has_gpu: bool) -> torch.device:
    """Where the model goes. Raises `ModelError` when a GPU is asked for and there is none."""
    wanted = model.device
    if wanted == "auto":
        wanted = "cuda" if has_gpu else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ModelError(
            "A GPU is asked for (model.device or model_server.num_gpus) and torch sees none here; install torch with "
            "CUDA and a driver, or set model.device: cpu and model_server.num_gpus: 0."
        )
    if wanted == "cpu" and model.device_map is not None:
        raise ModelError("model.device_map spreads a model over GPUs and this replica has none; remove it.")
    return torch.device("cuda", torch.cuda.current_device()) if wanted == "cuda" else torch.device("cpu")


def choose_dtype(config: Any, model: ModelConfig, device: torch.device) -> str:
    """`float32`, `bfloat16` or `float16`: as configured; `auto` is the checkpoint's on a GPU and float32 on a CPU."""
    if model.dtype != "auto":
        return model.dtype
    if device.type == "cpu":
        return "float32"
    own = str(getattr(config, "dtype", None) or config.get_text_config().dtype or "").removeprefix("torch.")
    return own if own in DTYPE_BYTES else "bfloat16"


def choose_context(config: Any, model: ModelConfig) -> int:
    """Tokens of prompt plus output. Raises `ModelError` when `max_model_len` is over the model's own context."""
    own = own_context_tokens(config)
    if own is None and model.max_model_len is None:
        raise ModelError(f"The config of {model.source} states no context length; set model.max_model_len.")
    if own is not None and model.max_model_len is not None and model.max_model_len > own:
        raise ModelError(
            f"model.max_model_len is {model.max_model_len} and the model's own context is {own}; lower it, or leave "
            "it out."
        )
    return model.max_model_len or own or 0


def _from_pretrained(
    files: ModelFiles,
    model: ModelConfig,
    config: Any,
    device: torch.device,
    dtype: torch.dtype,
) -> PreTrainedModel:
    factory: Any = AutoModelForCausalLM  # its methods carry no types
    options: dict[str, Any] = {}
    if model.device_map is not None:
        options["device_map"] = model.device_map
    elif device.type == "cuda" or model.quantization != "none":  # bitsandbytes takes a GPU it sees, unless told
        options["device_map"] = {"": device}
    if (quantization := quantization_config(model, dtype)) is not None:
        options["quantization_config"] = quantization
    try:
        loaded, report = factory.from_pretrained(
            files.folder,
            config=config,
            dtype=dtype,
            attn_implementation=_attention_name(config),
            use_safetensors=not is_pickle(weight_files(files.folder)),
            trust_remote_code=model.trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    except torch.cuda.OutOfMemoryError as error:
        raise _out_of_memory(files.name, "GPU") from error
    except MemoryError as error:
        raise _out_of_memory(files.name, "main") from error
    except LOAD_ERRORS as error:
        raise explain(files.name, files.folder, error) from error
    _require_complete(files, report)
    _require_no_offload(files, model, loaded)
    assert isinstance(loaded, PreTrainedModel)
    return loaded


def _attention_name(config: Any) -> str:
    """The engine sets its own later. Some classes (Gemma 2, for its softcap) have no SDPA and refuse the name."""
    return "sdpa" if getattr(built_in_class(config), "_supports_sdpa", False) else "eager"


def _require_complete(files: ModelFiles, report: Any) -> None:
    """transformers fills what a checkpoint lacks with random numbers, and only logs it."""
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(f"{files.folder} lacks weights of the model, e.g. {missing[0]}; fetch a whole checkpoint.")
    if report["mismatched_keys"]:
        name = sorted(str(key) for key in report["mismatched_keys"])[0]
        raise ModelError(f"{files.folder}: weights don't have the shape that config.json says, e.g. {name}.")


def _require_no_offload(files: ModelFiles, model: ModelConfig, loaded: Any) -> None:
    """A device map that accelerate chose must not quietly put layers into main memory or on disk."""
    places = set(getattr(loaded, "hf_device_map", {}).values())
    if not isinstance(model.device_map, dict) and "cuda" in str(loaded.device) and places & {"cpu", "disk"}:
        raise _out_of_memory(files.name, "GPU")


def _require_memory(name: str, needed: int, device: torch.device) -> None:
    """Refuse before loading rather than be killed while loading."""
    if device.type == "cuda":
        free: int | None = sum(torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count()))
        kind = "GPU"
    else:
        free, kind = available_memory_bytes(), "main"
    if free is not None and needed > free:
        raise ModelError(
            f"{name} needs {needed / 1e9:.1f} GB of {kind} memory for its weights and {free / 1e9:.1f} GB are free; "
            "use a smaller model, model.quantization, or a larger machine."
        )


def _out_of_memory(name: str, kind: str) -> ModelError:
    return ModelError(
        f"{name} doesn't fit into the {kind} memory that is free; use a smaller model, model.quantization, "
        "or more GPUs with model.device_map: auto."
    )
