"""How many pages of KV cache fit into a device's memory beside the weights, and the cache that is allocated in them."""

from __future__ import annotations

import torch

from serve_app.config import GPU_MEMORY_FRACTION, EngineConfig
from serve_app.engine.engine_error import EngineError
from serve_app.engine.kv_cache import KVCache
from serve_app.engine.model_runner import ModelRunner
from serve_app.engine.recording import graph_bytes
from serve_app.engine.sampling import scratch_bytes
from serve_app.memory import available_memory_bytes

CPU_KV_CACHE_BYTES = 2**30
"""Default size on a CPU: 2.8 streams of 8,192 tokens of the demo model."""
CPU_STEP_BYTES = 2**28
"""Main memory that must be left for a replica's steps. Steps of the demo model took 12 MB with our kernels and 73 MB
with torch's (32 streams, prompts of 2,000 tokens). Llama-2-7B is seven times as wide."""
_LEFT_FREE = 0.1
"""Share of a GPU's memory that stays free for libraries and fragments, unless the config claims more."""
_CONTEXT_BYTES = 2**29
"""Memory of a GPU that CUDA and its libraries take for a process, beside what PyTorch allocates."""


def count_pages(runner: ModelRunner, config: EngineConfig, context_tokens: int, page_tokens: int) -> int:
    """Pages of `page_tokens` tokens to hand out.

    Raises:
        EngineError: too few pages fit into the budget, or main memory can't hold them.
    """
    page_bytes = page_tokens * _bytes_per_token(runner)
    budget = config.kv_cache_memory
    if budget is None:
        budget = _gpu_budget(runner, config) if runner.device.type == "cuda" else CPU_KV_CACHE_BYTES
    useful = -(-context_tokens // page_tokens) * config.max_running
    num_pages = min(budget // page_bytes, useful)
    if num_pages * page_tokens < max(64, page_tokens):
        raise EngineError(
            f"{budget / 2**20:.0f} MiB of KV cache hold only {num_pages * page_tokens} tokens "
            f"({page_bytes / page_tokens / 1024:.0f} KiB each): raise engine.kv_cache_memory"
        )
    free = available_memory_bytes() if runner.device.type == "cpu" else None
    # Linux would promise the memory and later kill the process.
    if free is not None and num_pages * page_bytes + CPU_STEP_BYTES > free:
        raise EngineError(
            f"{num_pages * page_bytes / 2**30:.1f} GiB of KV cache and {CPU_STEP_BYTES / 2**30:.1f} GiB for the "
            f"computation don't fit into the {free / 2**30:.1f} GiB of main memory that are free: lower "
            "engine.kv_cache_memory, or use a smaller model or a larger machine"
        )
    return num_pages


def _bytes_per_token(runner: ModelRunner, device: torch.device | None = None) -> int:
    """Bytes of KV cache for one token, over all layers or those on one device."""
    shapes = [layer.shape for layer in runner.layers.values()]
    return sum(shape.bytes_per_token for shape in shapes if device is None or shape.device == device)


def allocate(runner: ModelRunner, num_pages: int, page_tokens: int) -> KVCache:
    """A cache of `num_pages` pages to hand out. Raises EngineError when there is no memory for it."""
    shapes = {index: layer.shape for index, layer in runner.layers.items()}
    try:
        # One page more than is handed out takes the keys and values of padding rows.
        return KVCache(shapes, num_pages + 1, page_tokens)
    except RuntimeError as error:  # torch raises it, or its subclass OutOfMemoryError, when memory is short
        raise EngineError(
            f"there is no memory for {num_pages * page_tokens * _bytes_per_token(runner) / 2**30:.1f} GiB of KV cache: "
            "lower engine.kv_cache_memory or engine.gpu_memory_fraction"
        ) from error


def _gpu_budget(runner: ModelRunner, config: EngineConfig) -> int:
    """Bytes of KV cache that fit, spread over the GPUs as the layers are.

    On each GPU the cache takes at most what weights and activations leave of `gpu_memory_fraction`, and at most what
    other processes leave free.

    Raises:
        EngineError: no memory is left for the cache.
    """
    fraction = config.gpu_memory_fraction or GPU_MEMORY_FRACTION
    devices = {layer.shape.device for layer in runner.layers.values()}
    step = max(config.max_step_tokens, config.max_running)
    reserve = runner.peak_bytes(step) + scratch_bytes(config.max_running, runner.vocab_size)
    if config.cuda_graphs:
        reserve += graph_bytes(runner, config)
    torch.cuda.empty_cache()
    budgets = []
    for device in devices:
        free, total = torch.cuda.mem_get_info(device)
        # Memory of other processes lowers what is free, and does not count against our own share.
        own = int(total * fraction) - torch.cuda.memory_reserved(device) - _CONTEXT_BYTES
        share = min(own, free - int(total * min(_LEFT_FREE, 1 - fraction))) - reserve
        budgets.append(share * _bytes_per_token(runner) // _bytes_per_token(runner, device))
    # Each page has a part on every device, so the device that is full first decides.
    budget = min(budgets)
    if budget <= 0:
        raise EngineError(
            f"the weights leave no room for a KV cache within {fraction:.0%} of the GPU's memory: "
            "use a quantization, more GPUs with model.device_map, or a higher engine.gpu_memory_fraction"
        )
    return budget
