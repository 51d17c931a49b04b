"""Records CUDA graphs for a runner, where its model, device and attention kernel allow them."""

from __future__ import annotations

import logging
import time

from serve_app.config import EngineConfig
from serve_app.engine.attention.base import TabledAttention
from serve_app.engine.cuda.capture import CudaCapture
from serve_app.engine.cuda.graphs import StepGraphs, step_shapes
from serve_app.engine.cuda.recording_check import RecordingCheck
from serve_app.engine.model_runner import ModelRunner

logger = logging.getLogger(__name__)

_LIBRARIES_BYTES = 256 * 2**20
"""Memory of the recordings themselves and of cuBLAS's second workspace, rounded up."""


def graph_bytes(runner: ModelRunner, config: EngineConfig) -> int:
    """Memory that the recordings keep: the activations of the largest step, its logits, and the libraries'."""
    shapes = step_shapes(config.max_running, config.max_step_tokens, runner.fixed_rows)
    most_kept = max(shape.kept for shape in shapes)
    # A logit takes at most 4 bytes in the model's dtype, and 4 in the float32 copy that the recording leaves.
    return runner.peak_bytes(max(shapes).rows) + 8 * most_kept * runner.vocab_size + _LIBRARIES_BYTES


def record_graphs(
    runner: ModelRunner, backend: TabledAttention, config: EngineConfig, context_tokens: int
) -> list[str]:
    """Record and check the steps that graphs can serve, and have the runner use them.

    A model on several devices gets none.

    Args:
        runner: already serves with `backend`; nothing is in its cache yet.
        backend: the runner's attention kernel.
        config: the engine's settings.
        context_tokens: tokens of the longest sequence.

    Returns:
        A sentence for each size of step that is not served from a graph although it was asked for.
    """
    devices = {layer.shape.device for layer in runner.layers.values()} | {runner.device}
    if len(devices) > 1:
        return []
    started = time.monotonic()
    cache = runner.cache
    shapes = step_shapes(config.max_running, config.max_step_tokens, runner.fixed_rows)
    graphs = StepGraphs(
        runner.forward,
        backend,
        cache,
        device=runner.device,
        vocab_size=runner.vocab_size,
        most_pages=-(-context_tokens // cache.page_tokens) + 1,
        shapes=shapes,
    )
    check = RecordingCheck(
        runner.compute, cache, tuple(runner.layers), runner.vocab_size, context_tokens, config.batch_invariant
    )
    notes = graphs.record(CudaCapture(runner.device), check)
    runner.graphs = graphs
    logger.info(
        "%d of %d sizes of step are CUDA graphs, recorded and checked in %.1f s",
        len(graphs.shapes), len(shapes), time.monotonic() - started,
    )  # fmt: skip
    return notes
