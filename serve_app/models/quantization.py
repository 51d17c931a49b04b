"""`model.quantization` through bitsandbytes: the settings for transformers, and corrections once a model has loaded.

Promises that nothing of the unquantised weights stays in memory, that a layer computes on the device it is on, and a
note for the user where quantisation costs speed. What each kind costs: docs/quantization.md.
"""

from __future__ import annotations

import ctypes
import logging
import platform
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from serve_app.config import ModelConfig
from serve_app.models.int8_linear import use_int8_linears

logger = logging.getLogger(__name__)

_PACKED_ROWS = 32
"""bitsandbytes' bfloat16 kernel for CPUs takes weights in blocks of this many rows, and fails for other shapes."""


def quantization_config(model: ModelConfig, dtype: torch.dtype) -> Any:
    """transformers' form of `model.quantization`; None for `none`."""
    settings: dict[str, Any]
    if model.quantization == "none":
        return None
    if model.quantization == "bnb-int8":
        settings = {"load_in_8bit": True, "llm_int8_threshold": model.llm_int8_threshold}
    else:
        kind = model.quantization.removeprefix("bnb-")
        settings = {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_compute_dtype": dtype}
    return BitsAndBytesConfig(**settings)  # type: ignore[no-untyped-call]


def settle(loaded: PreTrainedModel, model: ModelConfig) -> tuple[str, ...]:
    """Make a quantised model that has just been loaded ready to serve; returns notes for the user."""
    # bitsandbytes would log for each layer of each step that float32 is cast to float16, which is intended.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    _return_freed_memory()
    if loaded.device.type != "cpu":
        return ()
    if model.quantization != "bnb-int8":
        fast = _use_packed_kernel_where_it_fits(loaded)
    else:
        fast = model.llm_int8_threshold == 0 and use_int8_linears(loaded) > 0
    # With a fast kernel, `none` is faster only for checkpoints that it reads as 16 bits or as a GGUF file's codes.
    when = ", unless the checkpoint is float32 to the last bit" if fast else ""
    note = (
        f"model.quantization {model.quantization} saves memory on this CPU and costs speed: answers come slower than "
        f"with none{when} (docs/quantization.md)"
    )
    logger.warning(note)
    return (note,)


def held_bytes(model: PreTrainedModel) -> int:
    """Bytes of parameters, buffers and bitsandbytes' scales, a shared (tied) tensor counted once."""
    tensors = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        scales = (getattr(parameter, "SCB", None), getattr(getattr(parameter, "quant_state", None), "absmax", None))
        tensors.extend(tensor for tensor in scales if tensor is not None)
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


def _use_packed_kernel_where_it_fits(loaded: PreTrainedModel) -> bool:
    """Whether any layer uses bitsandbytes' 4-bit kernel for CPUs; it is turned off for shapes that it can't take."""
    from bitsandbytes.nn.modules import Linear4bit  # a second of imports, only for those who quantise

    fast = False
    for module in loaded.modules():
        if isinstance(module, Linear4bit) and module.support_avx512bf16_for_cpu:
            weight: Any = module.weight
            rows, columns = weight.quant_state.shape
            fits = rows % _PACKED_ROWS == 0 and columns % weight.quant_state.blocksize == 0
            module.support_avx512bf16_for_cpu = fits
            fast |= fits
    return fast


def _return_freed_memory() -> None:
    """Give freed memory back to the system. glibc would keep it: 220 MB of the demo model's float32 weights."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
