"""Builds an engine: chooses and checks the attention kernel, and allocates the KV cache, before anything is served."""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from serve_app.config import EngineConfig
from serve_app.core import GenerationRequest, LoadStage
from serve_app.engine.attention.base import AttentionBackend, TabledAttention
from serve_app.engine.attention.plain import PlainAttention
from serve_app.engine.attention.sdpa import SdpaAttention
from serve_app.engine.attention.varlen import VarlenAttention
from serve_app.engine.core import EngineCore
from serve_app.engine.cpu.attention import CpuAttention
from serve_app.engine.cpu.fusion import fuse_modules
from serve_app.engine.cpu.library import Kernels, load_kernels
from serve_app.engine.cpu.linear import pack_linears
from serve_app.engine.cpu.widen import HALVES, widen
from serve_app.engine.cuda.attention import TritonAttention
from serve_app.engine.engine_error import EngineError, UnsupportedModelError
from serve_app.engine.host_memory import page_out_mapped_weights
from serve_app.engine.kernel_trial import Trial, try_apart
from serve_app.engine.kv_budget import allocate, count_pages
from serve_app.engine.kv_cache import PagePool
from serve_app.engine.load_check import check_batch_invariance, check_model, measure_row_cost
from serve_app.engine.model_runner import ModelRunner
from serve_app.engine.numerics import numerics_id
from serve_app.engine.prompt_lookup import ROW_COST
from serve_app.engine.prompt_pace import PromptPace
from serve_app.engine.recording import record_graphs
from serve_app.engine.sampling import Sampler
from serve_app.engine.scheduler import Scheduler

logger = logging.getLogger(__name__)

MASK_THREADS = 4
"""Threads that compute the masks of grammars, at most; no more than compute the model. 32 masks take about 1 ms."""

Backends = SequenceOf[Callable[[], AttentionBackend]]


@dataclass(frozen=True, slots=True)
class EngineCapacity:
    """What the engine can hold, and how it computes."""

    kv_capacity_tokens: int
    kv_cache_bytes: int
    context_tokens: int
    page_tokens: int
    attention_backend: str
    batch_invariant: bool
    """A request's logits are the same bits whatever is computed beside it (checked by `check_batch_invariance`)."""
    numerics_id: str = ""
    """Names how the engine computes (`numerics.numerics_id`); empty where it is not batch-invariant."""
    notes: tuple[str, ...] = ()
    """Fallbacks taken, one sentence each."""


def build_core(
    model: PreTrainedModel,
    config: EngineConfig,
    *,
    context_tokens: int,
    dtype: torch.dtype | None,
    on_stage: Callable[[LoadStage], None],
    before_isolated: Callable[[GenerationRequest], None],
    kernel_cache: Path | None,
) -> tuple[EngineCore, EngineCapacity]:
    """An engine's core with checked kernels and an allocated KV cache; arguments and errors are those of `Engine`."""
    on_stage(LoadStage("preparing the kernels"))
    kernels, kernel_notes = _use_cpu_kernels(model, config, kernel_cache, dtype)
    step_tokens = max(config.max_step_tokens, config.max_running)
    padded = config.batch_invariant and kernels is None
    runner = ModelRunner(model, (step_tokens, config.max_running) if padded else None)
    tried = None if kernel_cache is None else kernel_cache / "tried"
    notes = _use_attention(runner, config, context_tokens, on_stage, _candidates(config, kernels), tried)
    backend, cache = runner.backend, runner.cache
    if config.cuda_graphs and isinstance(backend, TabledAttention):
        on_stage(LoadStage("recording CUDA graphs"))
        notes += record_graphs(runner, backend, config, context_tokens)
    num_pages, page_tokens = cache.num_pages - 1, cache.page_tokens
    context_tokens = min(context_tokens, num_pages * page_tokens)
    # Our own kernel for CPUs adds up blocks of 64 keys from the first on, for any number of keys; checking long
    # contexts with the demo model would take 6 s of every start (2 cores).
    batch_invariant = check_batch_invariance(runner, 0 if isinstance(backend, CpuAttention) else context_tokens)
    if config.batch_invariant and not batch_invariant:
        notes.append("engine.batch_invariant does not hold on this device: other requests may change an answer")
    for note in notes:
        logger.warning(note)
    numerics = numerics_id(backend.name, kernels, runner.device, page_tokens=page_tokens, fixed_rows=runner.fixed_rows)
    capacity = EngineCapacity(
        kv_capacity_tokens=num_pages * page_tokens,
        kv_cache_bytes=cache.bytes,
        context_tokens=context_tokens,
        page_tokens=page_tokens,
        attention_backend=backend.name,
        batch_invariant=batch_invariant,
        numerics_id=numerics if batch_invariant else "",
        notes=(*kernel_notes, *notes),
    )
    # Measured only for prompt lookup on a CPU, where it ranges from 1/40 (32-bit weights) to 1/5 (4-bit weights).
    measured = runner.device.type == "cpu" and config.prompt_lookup
    scheduler = Scheduler(
        PagePool(num_pages, in_runs=backend.reads_runs),
        page_tokens=page_tokens,
        max_running=config.max_running,
        max_step_tokens=config.max_step_tokens,
        prompt_lookup=config.prompt_lookup,
        row_cost=measure_row_cost(runner) if measured else ROW_COST,
        pace=None if padded else PromptPace(),  # padded steps all take as long
    )
    sampler = Sampler(kernels)
    core = EngineCore(
        runner,
        scheduler,
        sampler,
        numerics_id=capacity.numerics_id,
        mask_threads=min(MASK_THREADS, config.threads or 1),
        before_isolated=before_isolated,
    )
    return core, capacity


def _use_cpu_kernels(
    model: PreTrainedModel, config: EngineConfig, cache_dir: Path | None, dtype: torch.dtype | None
) -> tuple[Kernels | None, list[str]]:
    """Give a model that computes in float32 on a CPU our kernels; returns them, and a note where they can't be used.

    A quantised model computes in float32 too; the kernels then serve its output head and its attention. With a `dtype`
    of float32, a model whose weights are held in 16 bits is made to compute in float32, with or without our kernels.

    Raises:
        EngineError: there is no memory for the weights in float32.
    """
    narrow = dtype is torch.float32 and any(p.dtype in HALVES for p in model.parameters())
    computes = {torch.float32, *(HALVES if narrow else ())}
    on_cpu = all(
        p.device.type == "cpu" and (p.dtype in computes or not p.is_floating_point()) for p in model.parameters()
    )
    kernels: Kernels | None = None
    notes: list[str] = []
    if cache_dir and config.cpu_kernels and on_cpu:
        try:
            kernels = load_kernels(cache_dir)
            pack_linears(model, kernels)
        except EngineError as error:
            kernels = None
            notes.append(f"{error}; torch's kernels are used, about half as fast with several streams")
            logger.warning(notes[0])
    if narrow:
        widen(model)
    if kernels is not None:
        fuse_modules(model, kernels)
        page_out_mapped_weights()
    return kernels, notes


def _use_attention(
    runner: ModelRunner,
    config: EngineConfig,
    context_tokens: int,
    on_stage: Callable[[LoadStage], None],
    candidates: Backends,
    tried: Path | None,
) -> list[str]:
    """Give the runner the first attention kernel that passes its checks, and a KV cache in its page size.

    `tried`: folder that remembers which kernels for GPUs have passed in a process of their own.

    Returns:
        Why kernels are not used, one sentence each.

    Raises:
        UnsupportedModelError: no kernel passes: even the plain path doesn't reproduce the model.
        EngineError: the page size of the config doesn't suit the first kernel, or no page fits into the memory.
    """
    if runner.device.type == "cuda":
        # cuDNN's attention plans anew for every length it meets: 108 ms a decode step instead of 20 (H100, 22 layers).
        torch.backends.cuda.enable_cudnn_sdp(False)
    on_stage(LoadStage("checking attention"))
    notes: list[str] = []
    complaint: str | None = None
    failed = False
    for make in candidates:
        backend = make()
        if (complaint := _refused(backend, runner)) is not None:
            if config.attention != "auto":
                notes.append(f"engine.attention {backend.name} can't be used: {complaint}")
            continue
        page_tokens = config.page_tokens or backend.page_tokens
        if page_tokens % backend.page_multiple:
            complaint = (
                f"engine.page_tokens {page_tokens} must be a multiple of {backend.page_multiple} "
                f"for the {backend.name} attention kernel"
            )
            if not failed:
                raise EngineError(complaint)
            # After another kernel has failed, a kernel whose pages don't suit the config is skipped without an error.
        elif (complaint := _fails(backend, runner, page_tokens, tried)) is None:
            num_pages = count_pages(runner, config, context_tokens, page_tokens)
            on_stage(LoadStage("checking the model"))
            if (complaint := _differs(backend, runner, num_pages, page_tokens)) is None:
                on_stage(LoadStage("allocating the KV cache"))
                runner.use(backend, allocate(runner, num_pages, page_tokens))
                return notes
        failed = True
        notes.append(f"attention kernel {backend.name} failed its check and is not used: {complaint}")
    raise UnsupportedModelError(f"{runner.name} can't be served: {complaint}")


def _candidates(config: EngineConfig, kernels: Kernels | None) -> Backends:
    """The kernels to try for `engine.attention`, in order. The plain path comes last, whatever the config names."""
    known: dict[str, Callable[[], AttentionBackend]] = {
        "triton": partial(TritonAttention, batch_invariant=config.batch_invariant),
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
    trial = Trial(backend, tuple(dict.fromkeys(runner.layers.values())), page_tokens)
    if _may_end_the_process(runner) and (complaint := try_apart(trial, tried)) is not None:
        return complaint
    return trial.run()


def _may_end_the_process(runner: ModelRunner) -> bool:
    """A fault on a GPU ends the process's use of it. Our CPU kernels were tried in a child when they were compiled."""
    return any(layer.shape.device.type == "cuda" for layer in runner.layers.values())


def _differs(backend: AttentionBackend, runner: ModelRunner, num_pages: int, page_tokens: int) -> str | None:
    """What is wrong with the model's logits with this kernel, or None. The check takes at most `num_pages` pages.

    Its cache is released afterwards, so that the memory for the next one is measured as if no kernel had been tried.
    """
    runner.use(backend, allocate(runner, min(num_pages, _check_pages(page_tokens)), page_tokens))
    complaint = check_model(runner)
    runner.release()
    return complaint


def _check_pages(page_tokens: int) -> int:
    """Pages that are enough for `check_model`: for 71 tokens of three sequences, and a page of slack for each."""
    return -(-128 // page_tokens) + 4
