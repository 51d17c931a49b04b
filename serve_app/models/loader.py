"""Loads a model's files into a transformers model in memory, ready for the engine, or raises `ModelError`.

Promises that the weights are held once: on a CPU in the checkpoint's own dtype they stay memory-mapped, so replicas on
one machine share them; that no weight is left at random values; and that a model that can't be served is refused.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.import_utils import is_peft_available

from serve_app.config import ModelConfig
from serve_app.core import Fingerprint, LoadStage
from serve_app.memory import available_memory_bytes
from serve_app.models.cache import Progress
from serve_app.models.checkpoint import is_pickle, is_safetensors, tensors, weight_files
from serve_app.models.completeness import require_complete
from serve_app.models.fingerprint import fingerprint
from serve_app.models.model_error import ModelError
from serve_app.models.quantization import held_bytes, quantization_config, settle
from serve_app.models.rotary import choose_angles, settle_angles
from serve_app.models.sizes import DTYPE_BYTES, own_context_tokens, stored_weights_bytes
from serve_app.models.source import ModelFiles
from serve_app.models.support import LOAD_ERRORS, built_in_class, check_architecture, explain, read_config
from serve_app.transformers_internals import attention_name, has_sdpa

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HALVES = {"BF16": "bfloat16", "F16": "float16"}
"""safetensors' names of 16-bit dtypes -> torch's."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory, in eval mode and without gradients, and what is known of it."""

    model: PreTrainedModel
    fingerprint: Fingerprint
    name: str
    context_tokens: int
    """Longest prompt plus output: the model's own, or less by `max_model_len`."""
    device: torch.device
    """The device that takes the ids; with a device map, that of the model's first part."""
    dtype: torch.dtype
    """The dtype of activations, and so of keys and values. Weights may be smaller: quantised, or held in 16 bits until
    they are taken to compute in float32."""
    notes: tuple[str, ...]

    @property
    def weights_bytes(self) -> int:
        """Bytes that the weights take now: as they were loaded, or as the engine keeps them."""
        return held_bytes(self.model)

    def in_full(self) -> PreTrainedModel:
        """The model with its weights converted to `dtype`, for use without the engine."""
        if self.model.dtype != self.dtype:
            self.model.to(self.dtype)  # type: ignore[arg-type]
        return self.model


def load(files: ModelFiles, model: ModelConfig, *, has_gpu: bool, progress: Progress) -> LoadedModel:
    """Load the weights in `files` as `model` says. `has_gpu` is whether this replica was given one.

    Raises `ModelError`.
    """
    config = read_config(files.folder, files.name, trust_remote_code=model.trust_remote_code)
    device = choose_device(model, has_gpu=has_gpu)
    dtype = choose_dtype(config, model, device)
    context_tokens = choose_context(config, model)
    angles = choose_angles(config, context_tokens, files.name)

    def load_in(held: str) -> PreTrainedModel:
        needed = stored_weights_bytes(files.folder, held, model.quantization)
        _require_memory(files.name, needed, device)
        progress(LoadStage(f"loading weights ({needed / 1e9:.1f} GB, {held})"))
        return _from_pretrained(files, model, config, device, _DTYPES[held])

    held = held_dtype(files.folder, config, model, device, dtype)
    loaded = load_in(held)
    check_architecture(config, type(loaded))
    if held != dtype:
        try:
            _compute_constants(loaded, model, _DTYPES[dtype])
        except Exception:  # a model's own code may raise anything without weights
            logger.info("%s is held in %s", files.name, dtype, exc_info=True)
            loaded = load_in(dtype)
    loaded.train(False).requires_grad_(False)
    notes = files.notes if model.quantization == "none" else (*files.notes, *settle(loaded, model))
    notes += settle_angles(loaded, angles, files.name)
    progress(LoadStage("fingerprinting weights"))
    return LoadedModel(
        model=loaded,
        fingerprint=fingerprint(files.folder, files.tokenizer_folder, model, dtype, angles),
        name=files.name,
        context_tokens=context_tokens,
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
            "The config wants a GPU (model.device or model_server.num_gpus) and torch finds none; install torch with "
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
    own = _own_dtype(config)
    return own if own in DTYPE_BYTES else "bfloat16"


def held_dtype(folder: Path, config: Any, model: ModelConfig, device: torch.device, dtype: str) -> str:
    """The dtype in which memory holds the weights: `dtype`, or on a CPU that computes in float32 the checkpoint's own
    16-bit dtype, if all of it has the same. Nothing is lost: each 16-bit value is a float32 too. Before the weights are
    fetched, the config's dtype is taken for theirs."""
    quantized = model.quantization != "none" or getattr(config, "quantization_config", None) is not None
    if device.type != "cpu" or dtype != "float32" or quantized or model.device_map is not None:
        return dtype
    files = weight_files(folder)
    if not files:
        return own if (own := _own_dtype(config)) in _HALVES.values() else dtype
    if not all(map(is_safetensors, files)):
        return dtype
    stored = {entry.dtype for file in files for entry in tensors(file) if entry.is_float}
    return _HALVES.get(stored.pop(), dtype) if len(stored) == 1 else dtype


def _own_dtype(config: Any) -> str:
    """The checkpoint's dtype by its config; empty when the config states none."""
    return str(getattr(config, "dtype", None) or config.get_text_config().dtype or "").removeprefix("torch.")


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
    if (files.folder / "adapter_config.json").is_file() and is_peft_available():
        raise ModelError(
            f"{files.folder} holds an adapter beside the weights, which the installed package peft would apply; merge "
            "it, or move adapter_config.json away to serve the weights as they are."
        )
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
            # The engine sets its own later. Some classes (Gemma 2, for its softcap) have no SDPA and refuse the name.
            attn_implementation="sdpa" if has_sdpa(built_in_class(config)) else "eager",
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
    require_complete(str(files.folder), loaded, report)
    # A device map that accelerate chose must not quietly put layers into main memory or on disk.
    places = set(getattr(loaded, "hf_device_map", {}).values())
    if not isinstance(model.device_map, dict) and "cuda" in str(loaded.device) and places & {"cpu", "disk"}:
        raise _out_of_memory(files.name, "GPU")
    assert isinstance(loaded, PreTrainedModel)
    return loaded


def _compute_constants(loaded: PreTrainedModel, model: ModelConfig, dtype: torch.dtype) -> None:
    """Replace the tensors that a model's class computes, and no checkpoint holds, by those of a model of `dtype`: a
    class may round them to the dtype of its weights (Gemma's scale of embeddings), and they would differ in float32."""
    factory: Any = AutoModelForCausalLM
    with init_empty_weights(include_buffers=False):
        other = factory.from_config(
            loaded.config,
            dtype=dtype,
            attn_implementation=attention_name(loaded.config),
            trust_remote_code=model.trust_remote_code,
        )
    for name, module in other.named_modules():
        own = loaded.get_submodule(name)
        for key in module._non_persistent_buffers_set:
            own._buffers[key] = module._buffers[key]
        vars(own).update({key: value for key, value in vars(module).items() if isinstance(value, torch.Tensor)})
    if any(buffer.is_meta for buffer in loaded.buffers()):
        raise ValueError("the model computes constants from its weights while it loads")


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
