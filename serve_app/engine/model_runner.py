"""Runs a step through the unmodified transformers model: chunks in, logits of their last rows out.

A trial run finds out what the model's attention layers store and how they attend. A model that the paged path can't
reproduce is refused. Knows no scheduling and no sampling.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from transformers import PreTrainedModel

from serve_app.engine.attention.base import (
    ATTENTION_NAME,
    STEP_KEYWORD,
    AttentionBackend,
    AttentionParams,
    AttentionStep,
    PagedStep,
    Span,
    contiguous_runs,
    visible,
)
from serve_app.engine.attention.plain import plain_attention
from serve_app.engine.cpu.linear import PackedLinear
from serve_app.engine.cuda.graphs import StepGraphs
from serve_app.engine.engine_error import EngineError, UnsupportedModelError
from serve_app.engine.inputs import StepInputs
from serve_app.engine.kv_cache import KVCache, LayerShape
from serve_app.engine.scheduler import Chunk

_PROBED_QUERIES = 256
"""Queries that a probe computes at once. The probe also measures a step's memory; without blocks its scores of 8,192
tokens and 32 heads would add 28 GB, which the serving kernels for GPUs never hold."""


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """One attention layer, as seen in a forward pass."""

    shape: LayerShape
    query_heads: int
    params: AttentionParams


@dataclass(slots=True)
class _Probe:
    """An attention step that computes one sequence from its start by `plain_attention` and records the arguments."""

    layers: dict[int, AttentionLayer] = field(default_factory=dict)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, params: AttentionParams
    ) -> torch.Tensor:
        if layer in self.layers:
            raise UnsupportedModelError(f"attention layer {layer} is computed twice in one pass")
        shape = LayerShape(key.shape[1], key.shape[3], value.shape[3], key.dtype, key.device)
        self.layers[layer] = AttentionLayer(shape, query.shape[1], params)
        queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        blocks = []
        for first in range(0, len(queries), _PROBED_QUERIES):
            end = min(first + _PROBED_QUERIES, len(queries))
            mask = visible(Span(first, end - first, end, (), ()), params.sliding_window, query.device)
            blocks.append(plain_attention(queries[first:end], keys[:end], values[:end], mask, params))
        return torch.cat(blocks)[None]


class ModelRunner:
    """The model on its device or devices, and the KV cache once it is allocated."""

    def __init__(self, model: PreTrainedModel, fixed_rows: tuple[int, int] | None = None) -> None:
        """Find out how the model attends.

        Args:
            model: in eval mode; its attention implementation is changed.
            fixed_rows: compute every step with this many tokens and this many rows of logits, so that matrix products
                have one shape and a row's bits never depend on how many others there are.

        Raises:
            UnsupportedModelError: the model's attention never reaches the paged path.
        """
        self.name = type(model).__name__
        self.quantized = getattr(model, "hf_quantizer", None) is not None
        self.fixed_rows = fixed_rows
        embeddings: Any = model.get_input_embeddings()
        self.device: torch.device = next(chain(embeddings.parameters(), embeddings.buffers())).device
        self.backend: AttentionBackend
        self.cache: KVCache
        """`use` sets the backend and the cache, `release` deletes both. Before and after neither attribute exists."""
        self.graphs: StepGraphs | None = None
        """CUDA graphs that replay the steps that fit them; None while there are none."""
        self._model = model
        self._keeps_rows = "logits_to_keep" in inspect.signature(model.forward).parameters
        model.set_attn_implementation(ATTENTION_NAME)
        self.vocab_size, self.layers = self._probe_layers()

    def _probe_layers(self) -> tuple[int, dict[int, AttentionLayer]]:
        """The size of the vocabulary, and the attention layers."""
        probe, config = _Probe(), self._model.config.get_text_config()
        try:
            vocab_size = self._forward([1, 2, 3, 4], [0, 1, 2, 3], probe, [3]).shape[-1]
            masked = _masked_window(config, probe.layers)
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, AttributeError, RuntimeError) as error:
            packed = any(isinstance(module, PackedLinear) for module in self._model.modules())
            hint = "; engine.cpu_kernels: false may serve it" if packed else ""
            raise UnsupportedModelError(f"{self.name} can't be served: {error}{hint}") from error
        expected = config.num_hidden_layers
        if len(probe.layers) != expected:
            raise UnsupportedModelError(
                f"{self.name} can't be served: {len(probe.layers)} of its {expected} layers use transformers' "
                f"attention interface (models with recurrent or their own attention are not supported)"
            )
        if masked is not None:
            raise UnsupportedModelError(
                f"{self.name} can't be served: layer {masked} does not pass its sliding window to attention"
            )
        return vocab_size, probe.layers

    def peak_bytes(self, tokens: int) -> int:
        """Bytes that a step of `tokens` tokens takes on the busiest CUDA device beyond what is held now.

        Raises:
            EngineError: the device has less memory free.
        """
        devices = {layer.shape.device for layer in self.layers.values()}
        before = {}
        for device in devices:
            torch.cuda.reset_peak_memory_stats(device)
            before[device] = torch.cuda.memory_allocated(device)
        ids = [1] * tokens
        try:
            self._forward(ids, list(range(tokens)), _Probe(), [tokens - 1])
        except torch.OutOfMemoryError as error:
            raise EngineError(
                f"a step of {tokens} tokens doesn't fit into the GPU's memory beside the weights: lower "
                "engine.max_step_tokens, or use a quantization or more GPUs with model.device_map"
            ) from error
        return max(torch.cuda.max_memory_allocated(device) - before[device] for device in devices)

    def use(self, backend: AttentionBackend, cache: KVCache) -> None:
        """Serve from this cache with this kernel from now on."""
        self.backend, self.cache = backend, cache

    def release(self) -> None:
        """Drop the cache, so that its memory is free for another."""
        del self.backend, self.cache
        torch.cuda.empty_cache()

    def step(self, chunks: SequenceOf[Chunk]) -> torch.Tensor:
        """Compute the chunks; returns logits in float32 `[kept, vocab]`, the last `Chunk.kept` rows of each."""
        page_tokens = self.cache.page_tokens
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        spans: list[Span] = []
        rows: list[int] = []
        for chunk in chunks:
            sequence, known = chunk.sequence, chunk.sequence.computed + chunk.tokens
            end = known + len(chunk.draft)
            runs = contiguous_runs(sequence.pages, end, page_tokens) if self.backend.reads_runs else ()
            spans.append(Span(len(ids), end - sequence.computed, end, runs, tuple(sequence.pages)))
            ids.extend(sequence.token_ids[sequence.computed : known])
            ids.extend(chunk.draft)
            positions.extend(range(sequence.computed, end))
            slots.extend(
                sequence.pages[position // page_tokens] * page_tokens + position % page_tokens
                for position in range(sequence.computed, end)
            )
            rows.extend(range(len(ids) - chunk.kept, len(ids)))
        inputs = StepInputs(ids, positions, slots, spans, rows)
        if self.graphs is not None and (logits := self.graphs.run(inputs)) is not None:
            return logits
        return self.compute(inputs)

    def replays(self, chunks: SequenceOf[Chunk]) -> bool:
        """Whether `step` replays these chunks from a recording, and so returns while the device still computes."""
        return (
            bool(chunks)
            and self.graphs is not None
            and self.graphs.reaches(sum(chunk.tokens + len(chunk.draft) for chunk in chunks))
        )

    def compute(self, inputs: StepInputs) -> torch.Tensor:
        """A step without graphs: logits in float32 `[kept, vocab]`."""
        ids, positions, slots = inputs.ids, inputs.positions, inputs.slots
        rows = inputs.kept or [len(ids) - 1]
        if self.fixed_rows is not None:
            tokens, logit_rows = self.fixed_rows
            padding = [0] * (tokens - len(ids))
            scratch = (self.cache.num_pages - 1) * self.cache.page_tokens
            ids, positions, slots = ids + padding, positions + padding, slots + [scratch] * len(padding)
            rows = rows + [0] * (logit_rows - len(rows))
        step = PagedStep(self.backend, self.cache, inputs.spans, self._host(slots))
        return self._forward(ids, positions, step, rows)[: len(inputs.kept)]

    def _host(self, numbers: list[int]) -> torch.Tensor:
        """`[n]` of int64, in pinned memory for a GPU, from which copies are asynchronous."""
        return torch.tensor(numbers, pin_memory=self.device.type == "cuda")

    def _forward(self, ids: list[int], positions: list[int], step: AttentionStep, rows: list[int]) -> torch.Tensor:
        on_device = [self._host(numbers).to(self.device, non_blocking=True) for numbers in (ids, positions, rows)]
        return self.forward(on_device[0], on_device[1], step, on_device[2]).float()

    def forward(
        self, ids: torch.Tensor, positions: torch.Tensor, step: AttentionStep, rows: torch.Tensor
    ) -> torch.Tensor:
        """The model on tensors of its device: ids and positions `[tokens]`, and which rows of logits to keep.

        Returns:
            `[kept rows, vocab]` in the model's own dtype.
        """
        arguments = {STEP_KEYWORD: step} | ({"logits_to_keep": rows} if self._keeps_rows else {})
        output = self._model(input_ids=ids[None], position_ids=positions[None], use_cache=False, **arguments)
        logits: torch.Tensor = output.logits[0]
        return logits if self._keeps_rows else logits[rows]

    def reference_logits(self, ids: list[int]) -> torch.Tensor:
        """The model's own eager attention over one sequence, no cache: logits in float32 `[tokens, vocab]`."""
        self._model.set_attn_implementation("eager")
        try:
            inputs = torch.tensor([ids], device=self.device)
            return self._model(input_ids=inputs, use_cache=False).logits[0].float()  # type: ignore[no-any-return]
        finally:
            self._model.set_attn_implementation(ATTENTION_NAME)


def _masked_window(config: Any, layers: Mapping[int, AttentionLayer]) -> int | None:
    """The first layer whose sliding window is only in the model's masks, which the paged path never builds; else None.

    A window as wide as the context masks nothing and is no obstacle.
    """
    window, context = getattr(config, "sliding_window", None), getattr(config, "max_position_embeddings", None)
    if window and context and window >= context:
        return None
    types = getattr(config, "layer_types", None)
    if types is not None:
        windowed = {layer for layer, kind in enumerate(types) if kind == "sliding_attention"}
    else:
        # Only a field that the config's class declares is used by the model's code; others may be left-overs.
        used = window and hasattr(type(config), "sliding_window") and getattr(config, "use_sliding_window", True)
        handed = any(layer.params.sliding_window is not None for layer in layers.values())
        windowed = set(layers) if used and not handed else set()
    return next((i for i in sorted(windowed & set(layers)) if layers[i].params.sliding_window is None), None)
