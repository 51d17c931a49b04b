"""The seam between an unmodified transformers model and the paged KV cache.

transformers' `AttentionInterface` calls `paged_attention` in every layer. The description of a step travels as one
opaque keyword argument, because accelerate's hooks move tensors between devices but leave other objects alone. A
backend is an attention kernel with its own page size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from serve_app.engine.engine_error import UnsupportedModelError
from serve_app.engine.kv_cache import KVCache, LayerShape

ATTENTION_NAME = "serve_app_paged"
STEP_KEYWORD = "serve_app_step"

_HARMLESS = frozenset(
    {
        *("position_ids", "use_cache", "output_attentions", "output_hidden_states", "cache_position"),
        "output_router_logits",  # mixtures of experts hand it down to all parts of a layer
    }
)
"""Keywords that models pass to every attention function and that change nothing in a causal decoder."""


@dataclass(frozen=True, slots=True)
class Span:
    """The rows of one sequence in a step: its queries, and where its keys and values lie."""

    query_start: int
    query_len: int
    kv_len: int
    """Tokens in the cache once this step's are written; the queries are the last `query_len` of them."""
    runs: tuple[tuple[int, int], ...]
    """(first slot, slots) of the contiguous stretches that hold the `kv_len` tokens, in order."""
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AttentionParams:
    """The arguments of attention that the model's code passes, the same in each step."""

    scaling: float
    sliding_window: int | None = None
    """A query sees this many tokens, itself included."""
    softcap: float | None = None


def contiguous_runs(pages: SequenceOf[int], kv_len: int, page_tokens: int) -> tuple[tuple[int, int], ...]:
    """Merge neighbouring pages into (first slot, slots); the last is cut to `kv_len` tokens."""
    runs: list[tuple[int, int]] = []
    left = kv_len
    for page in pages:
        if left <= 0:
            break
        size = min(page_tokens, left)
        if runs and runs[-1][0] + runs[-1][1] == page * page_tokens:
            runs[-1] = (runs[-1][0], runs[-1][1] + size)
        else:
            runs.append((page * page_tokens, size))
        left -= size
    return tuple(runs)


def visible(span: Span, window: int | None, device: torch.device, first_key: int = 0) -> torch.Tensor:
    """Which keys each query of a span sees, `[query_len, kv_len - first_key]` of bool: causal, within the window."""
    query = torch.arange(span.kv_len - span.query_len, span.kv_len, device=device)[:, None]
    key = torch.arange(first_key, span.kv_len, device=device)[None, :]
    mask = key <= query
    return mask if window is None else mask & (key > query - window)


class AttentionBackend(ABC):
    """One attention kernel over paged keys and values."""

    name: ClassVar[str]
    page_tokens: ClassVar[int]
    """The page size that suits the kernel; a multiple of `page_multiple`."""
    page_multiple: ClassVar[int] = 1
    reads_runs: ClassVar[bool] = True
    """Whether it reads `Span.runs`. They are not made for other kernels, since their cost rises with the context."""

    @classmethod
    def refusal(cls, shape: LayerShape, params: AttentionParams) -> str | None:
        """Why this kernel can't serve such a layer, or None when it can."""
        return None

    @classmethod
    def missing(cls) -> str | None:
        """What this machine lacks to compile the kernel, and where to get it; None when it lacks nothing."""
        return None

    def prepare(self, spans: list[Span], device: torch.device) -> Any:
        """Make the `step` argument of `attend`, once for each device instead of once a layer; by default the spans."""
        return spans

    def write(
        self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        """Put a step's keys and values into a layer's cache, in the order that `attend` reads.

        Args:
            keys: the layer's cache, `[pages, page_tokens, kv_heads, key_dim]`. A kernel may order a page differently.
            values: the layer's cache, `[pages, page_tokens, kv_heads, value_dim]`.
            slots: page * page_tokens + place in the page of each token, `[tokens]` of int64.
            key: `[tokens, kv_heads, key_dim]`.
            value: `[tokens, kv_heads, value_dim]`.
        """
        keys.view(-1, *keys.shape[2:]).index_copy_(0, slots, key)
        values.view(-1, *values.shape[2:]).index_copy_(0, slots, value)

    @abstractmethod
    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, params: AttentionParams, step: Any
    ) -> torch.Tensor:
        """Attention of every span over its own sequence.

        Args:
            query: `[tokens, heads, key_dim]`, the spans' rows one after the other.
            keys: `[pages, page_tokens, kv_heads, key_dim]`; `write` has already put this step's keys there.
            values: `[pages, page_tokens, kv_heads, value_dim]`.
            params: scaling, window and softcap.
            step: what `prepare` returned for these spans and the query's device.

        Returns:
            `[tokens, heads, value_dim]`.
        """


class TabledAttention(AttentionBackend):
    """A kernel whose description of a step is one table of integers on the device, besides fixed sizes.

    So one captured launch serves every step within those sizes.
    """

    @abstractmethod
    def table_size(self, rows: int, most_spans: int, most_pages: int) -> int:
        """Size of the table for a step of `rows` tokens in `most_spans` spans, with `most_pages` pages together."""

    @abstractmethod
    def fill(self, table: npt.NDArray[np.int64], spans: list[Span], rows: int, most_spans: int) -> int:
        """Describe a step, on the host. Rows after the last span are padding. Returns how many numbers are used."""

    @abstractmethod
    def view(self, table: torch.Tensor, rows: int, most_spans: int) -> Any:
        """Make the `step` argument of `attend`, as views of a table on the device that holds what `fill` wrote.

        Padding rows come out as zeros.
        """


class PagedStep:
    """One forward pass over the paged cache: writes the step's keys and values, then attends."""

    def __init__(self, backend: AttentionBackend, cache: KVCache, spans: list[Span], slots: torch.Tensor) -> None:
        """`slots`: where each token of the step goes, `[tokens]` of int64. Tokens after the last span are padding."""
        self.backend, self.cache = backend, cache
        self._spans = spans
        self._slots = slots
        self._tokens = sum(span.query_len for span in spans)
        self._on_device: dict[torch.device, tuple[torch.Tensor, Any]] = {}

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, params: AttentionParams
    ) -> torch.Tensor:
        """Query, key, value `[1, heads, tokens, head_dim]` -> `[1, tokens, heads, value_dim]`."""
        keys, values = self.cache.layer(layer)
        slots, step = self.on(query.device)
        self.backend.write(keys, values, slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
        output = self.backend.attend(query[0, :, : self._tokens].transpose(0, 1), keys, values, params, step)
        padding = query.shape[2] - self._tokens
        return (output if not padding else F.pad(output, (0, 0, 0, 0, 0, padding)))[None]

    def on(self, device: torch.device) -> tuple[torch.Tensor, Any]:
        """The slots on this device, and what the backend prepared for it."""
        if device not in self._on_device:
            prepared = self.backend.prepare(self._spans, device)
            self._on_device[device] = (self._slots.to(device, non_blocking=True), prepared)
        return self._on_device[device]


class AttentionStep(Protocol):
    """What `paged_attention` calls in each layer."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, params: AttentionParams
    ) -> torch.Tensor: ...


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls.

    Raises:
        UnsupportedModelError: it is called with an argument that it would have to ignore.
    """
    step: AttentionStep | None = others.pop(STEP_KEYWORD, None)
    if step is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} does not get the keyword arguments of the model's forward"
        )
    for name, argument in others.items():
        if argument is not None and name not in _HARMLESS:
            raise UnsupportedModelError(
                f"{type(module).__name__} passes {name!r} to attention, which paged attention does not support"
            )
    if attention_mask is not None or is_causal is False:
        raise UnsupportedModelError(
            f"{type(module).__name__} uses an attention mask of its own; only causal decoders can be served"
        )
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    output = step.attend(module.layer_idx, query, key, value, AttentionParams(scaling, sliding_window, softcap))  # type: ignore[arg-type]
    return output.contiguous(), None  # some models call `view` on it


AttentionInterface.register(ATTENTION_NAME, paged_attention)
