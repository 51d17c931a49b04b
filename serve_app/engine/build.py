"""What an engine is made of, chosen and checked before it may serve: the attention kernel and the KV cache."""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from serve_app.config import GPU_MEMORY_FRACTION, EngineConfig
from serve_app.core import LoadStage
from serve_app.engine.attention.base import AttentionBackend, TabledAttention
from serve_app.engine.attention.check import check_attention
from serve_app.engine.attention.plain import PlainAttention
from serve_app.engine.attention.sdpa import SdpaAttention
from serve_app.engine.attention.varlen import VarlenAttention
from serve_app.engine.cpu.attention import CpuAttention
from serve_app.engine.cpu.fusion import fuse_modules
from serve_app.engine.cpu.library import Kernels, load_kernels
from serve_app.engine.cpu.linear import pack_linears
from serve_app.engine.cpu.widen import HALVES, widen
from serve_app.engine.cuda.attention import TritonAttention
from serve_app.engine.errors import EngineError, UnsupportedModelError
from serve_app.engine.host_memory import page_out_mapped_weights
from serve_app.engine.kernel_trial import Trial, try_apart
from serve_app.engine.kv_cache import KVCache
from serve_app.engine.load_check import check_exact, check_model, measure_row_cost
from serve_app.engine.model_runner import ModelRunner
from serve_app.engine.numerics import numerics_id
from serve_app.engine.prompt_lookup import ROW_COST
from serve_app.engine.recording import graph_bytes, record_graphs
from serve_app.engine.sampling import scratch_bytes
from serve_app.memory import available_memory_bytes

logger = logging.getLogger(__name__)

CPU_KV_CACHE_BYTES = 2**30
"""Where the config is silent: 2.8 streams of 8,192 tokens of the demo model."""
CPU_STEP_BYTES = 2**28
"""Main memory that must be left for a replica's steps. With the demo model, 32 streams and prompts of 2,000 tokens they
took 12 MB with our kernels and 73 MB with torch's; Llama-2-7B is seven times as wide."""
_LEFT_FREE = 0.1
"""Share of a GPU's memory that stays free, if the config does not claim it: for libraries and fragments."""
_CONTEXT_BYTES = 2**29
"""What CUDA and its libraries take of a GPU for a process, beside what PyTorch allocates."""

Backends = SequenceOf[Callable[[], AttentionBackend]]


@dataclass(frozen=True, slots=True)
class EngineCapacity:
    """What a replica holds."""

    kv_capacity_tokens: int
    kv_cache_bytes: int
    context_tokens: int
    page_tokens: int
    attention_backend: str
    reads_runs: bool
    """The attention kernel reads neighbouring pages in place."""
    exact: bool
    """A request's logits are the same bits in any company, as far as `load_check.check_exact` tries it."""
    numerics_id: str = ""
    """How it computes, where that is exact (`numerics.numerics_id`); empty where it is not."""
    notes: tuple[str, ...] = ()
    """Fallbacks taken, one sentence each."""
    row_cost: float = ROW_COST
    """What one more row adds to a step that decodes, as a share of a step of one row."""


def use_cpu_kernels(
    model: PreTrainedModel, config: EngineConfig, cache_dir: Path | None, dtype: torch.dtype | None = None
) -> tuple[Kernels | None, tuple[str, ...]]:
    """Have a model on a CPU that computes in float32 do so with our kernels; what to tell the user when that can't be.

    A quantised model computes in float32 too: its output head and its attention are the kernels' then. With a `dtype`
    of float32 so does a model whose weights are held in 16 bits, with our kernels or without them.

    Raises:
        EngineError: there is no memory for it.
    """
    narrow = dtype is torch.float32 and any(p.dtype in HALVES for p in model.parameters())
    computes = {torch.float32, *(HALVES if narrow else ())}
    on_cpu = all(
        p.device.type == "cpu" and (p.dtype in computes or not p.is_floating_point()) for p in model.parameters()
    )
    kernels, notes = _packed(model, cache_dir) if cache_dir and config.cpu_kernels and on_cpu else (None, ())
    if narrow:
        widen(model)
    if kernels is not None:
        fuse_modules(model, kernels)
        page_out_mapped_weights()
    return kernels, notes


def _packed(model: PreTrainedModel, cache_dir: Path) -> tuple[Kernels | None, tuple[str, ...]]:
    try:
        kernels = load_kernels(cache_dir)
        pack_linears(model, kernels)
    except EngineError as error:
        note = f"{error}; torch's own kernels serve, about half as fast with several streams"
        logger.warning(note)
        return None, (note,)
    return kernels, ()


def prepare(
    runner: ModelRunner,
    config: EngineConfig,
    context_tokens: int,
    on_stage: Callable[[LoadStage], None],
    kernels: Kernels | None = None,
    backends: Backends | None = None,
    tried: Path | None = None,
) -> EngineCapacity:
    """Give the runner the first attention kernel that passes its checks, and a KV cache in its page size.

    `tried`: folder in which it is remembered which kernels for GPUs have passed in a process of their own.

    Raises:
        UnsupportedModelError: even the plain path doesn't reproduce the model.
        EngineError: the memory for the KV cache doesn't hold a page.
    """
    if runner.device.type == "cuda":
        # cuDNN's attention plans anew for every length it meets: 108 ms a decode step instead of 20 (H100, 22 layers).
        torch.backends.cuda.enable_cudnn_sdp(False)
    notes: list[str] = []
    complaint: str | None = None
    failed = False
    on_stage(LoadStage("checking attention"))
    for make in backends or _candidates(config, kernels):
        backend = make()
        if (complaint := _refused(backend, runner)) is not None:
            if config.attention != "auto":
                notes.append(f"engine.attention {backend.name} can't be used: {complaint}")
            continue
        if (complaint := _page_complaint(backend, config)) is not None and not failed:
            raise EngineError(complaint)
        page_tokens = config.page_tokens or backend.page_tokens
        if complaint is None and (complaint := _fails(backend, runner, page_tokens, tried)) is None:
            num_pages = _num_pages(runner, config, context_tokens, page_tokens)
            on_stage(LoadStage("checking the model"))
            complaint = _differs(backend, runner, num_pages, page_tokens)
            if complaint is None:
                on_stage(LoadStage("allocating the KV cache"))
                cache = _allocate(runner, num_pages, page_tokens)
                runner.use(backend, cache)
                if config.cuda_graphs and isinstance(backend, TabledAttention):
                    on_stage(LoadStage("recording CUDA graphs"))
                    notes += record_graphs(runner, backend, cache, config, context_tokens)
                tokens = (cache.num_pages - 1) * page_tokens
                context_tokens = min(context_tokens, tokens)
                # Our own kernel for CPUs adds up blocks of 64 keys from the first on, of however many; with the demo
                # model on 2 cores the long contexts would take 6 s of every start.
                longest = 0 if isinstance(backend, CpuAttention) else context_tokens
                exact = check_exact(
                    runner, num_pages=cache.num_pages - 1, page_tokens=page_tokens, longest_tokens=longest
                )
                if config.batch_invariant and not exact:
                    notes.append(
                        "engine.batch_invariant does not hold on this device: a request's tokens may depend on others"
                    )
                for note in notes:
                    logger.warning(note)
                numerics = numerics_id(
                    backend.name, kernels, runner.device, page_tokens=page_tokens, fixed_rows=runner.fixed_rows
                )
                return EngineCapacity(
                    kv_capacity_tokens=tokens,
                    kv_cache_bytes=cache.bytes,
                    context_tokens=context_tokens,
                    page_tokens=page_tokens,
                    attention_backend=backend.name,
                    reads_runs=backend.reads_runs,
                    exact=exact,
                    numerics_id=numerics if exact else "",
                    notes=tuple(notes),
                    row_cost=_row_cost(runner, config, cache.num_pages - 1, page_tokens),
                )
        failed = True  # a kernel that only stands in for another is passed over where the config does not suit it
        notes.append(f"attention kernel {backend.name} failed its check and is not used: {complaint}")
    raise UnsupportedModelError(f"{runner.name} can't be served: {complaint}")


def _row_cost(runner: ModelRunner, config: EngineConfig, num_pages: int, page_tokens: int) -> float:
    """Measured where it decides something and differs: 1/40 to 1/5 on CPUs, as weights are kept in 32 bits or in 4."""
    if runner.device.type != "cpu" or not config.prompt_lookup:
        return ROW_COST
    return measure_row_cost(runner, num_pages=num_pages, page_tokens=page_tokens)


def _candidates(config: EngineConfig, kernels: Kernels | None) -> Backends:
    """What to try for `engine.attention`, in order. The plain path comes last, whatever was asked for."""
    known: dict[str, Callable[[], AttentionBackend]] = {
        "triton": partial(TritonAttention, exact=config.batch_invariant),
        "varlen": VarlenAttention,
    }
    if kernels is not None:
        known["cpu"] = partial(CpuAttention, kernels, config.page_tokens or CpuAttention.page_tokens)
    known |= {"sdpa": SdpaAttention, "plain": PlainAttention}
    if config.attention == "auto":
        return list(known.values())
    if config.attention not in known:
        raise EngineError(f"engine.attention {config.attention} needs engine.cpu_kernels and a C++ compiler")
    return [known[config.attention], PlainAttention]


def _refused(backend: AttentionBackend, runner: ModelRunner) -> str | None:
    for layer in runner.layers.values():
        if (reason := backend.refusal(layer.shape, layer.params)) is not None:
            return reason
    return None


def _fails(backend: AttentionBackend, runner: ModelRunner, page_tokens: int, tried: Path | None) -> str | None:
    if isinstance(backend, PlainAttention):
        return None
    layers = tuple(dict.fromkeys(runner.layers.values()))
    if _may_end_the_process(runner):
        complaint = try_apart(Trial(backend, layers, page_tokens), tried)
        if complaint is not None:
            return complaint
    for layer in layers:
        complaint = check_attention(backend, layer.shape, layer.query_heads, layer.params, page_tokens)
        if complaint is not None:
            return complaint
    return None


def _may_end_the_process(runner: ModelRunner) -> bool:
    """A fault on a GPU ends the process's use of it; on a CPU our kernels have been called before."""
    return any(layer.shape.device.type == "cuda" for layer in runner.layers.values())


def _page_complaint(backend: AttentionBackend, config: EngineConfig) -> str | None:
    if config.page_tokens is None or config.page_tokens % backend.page_multiple == 0:
        return None
    return (
        f"engine.page_tokens {config.page_tokens} must be a multiple of {backend.page_multiple} "
        f"for the {backend.name} attention kernel"
    )


def _differs(backend: AttentionBackend, runner: ModelRunner, num_pages: int, page_tokens: int) -> str | None:
    """What is wrong with the model's logits by this kernel, found in a cache of a few of the `num_pages` pages.

    The runner holds none afterwards: the next kernel's is measured and allocated as if this one had never been tried.
    """
    cache = _allocate(runner, min(num_pages, _check_pages(page_tokens)), page_tokens)
    runner.use(backend, cache)
    complaint = check_model(runner, num_pages=cache.num_pages - 1, page_tokens=page_tokens)
    runner.release()
    return complaint


def _check_pages(page_tokens: int) -> int:
    """Enough for `check_model`: 71 tokens of three sequences, and a page of slack for each."""
    return -(-128 // page_tokens) + 4


def _num_pages(runner: ModelRunner, config: EngineConfig, context_tokens: int, page_tokens: int) -> int:
    """Pages to hand out.

    Raises:
        EngineError: they are too few, or there is no memory for them.
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
    if runner.device.type == "cpu":
        _require_memory(num_pages * page_bytes)
    return num_pages


def _bytes_per_token(runner: ModelRunner, device: torch.device | None = None) -> int:
    """What its layers store of a token, or those on one device."""
    shapes = [layer.shape for layer in runner.layers.values()]
    return sum(shape.bytes_per_token for shape in shapes if device is None or shape.device == device)


def _allocate(runner: ModelRunner, num_pages: int, page_tokens: int) -> KVCache:
    shapes = {index: layer.shape for index, layer in runner.layers.items()}
    try:
        # One page more than is handed out takes the keys and values of padding rows.
        return KVCache(shapes, num_pages + 1, page_tokens)
    except RuntimeError as error:  # torch raises it, or its subclass OutOfMemoryError, when memory is short
        raise EngineError(
            f"there is no memory for {num_pages * page_tokens * _bytes_per_token(runner) / 2**30:.1f} GiB of KV cache: "
            "lower engine.kv_cache_memory or engine.gpu_memory_fraction"
        ) from error


def _require_memory(kv_cache_bytes: int) -> None:
    """Refuse rather than be killed: Linux promises memory that it lacks, and ends who then writes to it."""
    free = available_memory_bytes()
    if free is not None and kv_cache_bytes + CPU_STEP_BYTES > free:
        raise EngineError(
            f"{kv_cache_bytes / 2**30:.1f} GiB of KV cache and {CPU_STEP_BYTES / 2**30:.1f} GiB for the computation "
            f"don't fit into the {free / 2**30:.1f} GiB of main memory that are free: lower engine.kv_cache_memory, "
            "or use a smaller model or a larger machine"
        )


def _gpu_budget(runner: ModelRunner, config: EngineConfig) -> int:
    """Bytes of KV cache, spread over the GPUs as the layers are, that fit into what weights and activations leave of
    each one's fraction, and other processes of its memory."""
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
        # Others may have a share of the GPU: what they hold counts against what is free, and not against our own share.
        own = int(total * fraction) - torch.cuda.memory_reserved(device) - _CONTEXT_BYTES
        share = min(own, free - int(total * min(_LEFT_FREE, 1 - fraction))) - reserve
        budgets.append(share * _bytes_per_token(runner) // _bytes_per_token(runner, device))
    # Each page has a part on every device: the one that is full first decides.
    budget = min(budgets)
    if budget <= 0:
        raise EngineError(
            f"the weights leave no room for a KV cache within {fraction:.0%} of the GPU's memory: "
            "use a quantization, more GPUs with model.device_map, or a higher engine.gpu_memory_fraction"
        )
    return budget
