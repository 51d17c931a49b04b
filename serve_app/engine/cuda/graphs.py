"""Steps of fixed sizes as CUDA graphs: recorded at load and replayed with one launch instead of a thousand.

Promises to give the logits of the ordinary step. Before a recording may serve, it is compared with the ordinary step,
on other inputs than the recorded ones. A recording that fails or differs is dropped with a note. Steps that fit no
recording take the ordinary path. Knows no scheduling and no sampling.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import partial

import torch

from serve_app.engine.attention.base import AttentionParams, TabledAttention
from serve_app.engine.cuda.capture import Capture, Replay
from serve_app.engine.engine_error import first_line
from serve_app.engine.inputs import StepInputs
from serve_app.engine.kv_cache import KVCache

_MOST_ROWS = 1024
"""Tokens of the largest recorded step. Larger steps compute for longer than their launches take."""
_LARGE_STEP = 128
"""Sizes are powers of two up to this one and multiples of it beyond. A step of fewer tokens takes about as long as one
of this many, since most of its time goes into reading the weights."""


@dataclass(frozen=True, slots=True, order=True)
class StepShape:
    """The sizes of a recorded step: smaller steps are padded to it."""

    rows: int
    kept: int
    """Rows of logits, and the largest number of sequences."""


def step_shapes(max_running: int, max_step_tokens: int, fixed_rows: tuple[int, int] | None) -> list[StepShape]:
    """The sizes to record, smallest first. With `fixed_rows` all steps have that one size."""
    if fixed_rows is not None:
        return [StepShape(*fixed_rows)]
    largest = min(_MOST_ROWS, max(max_running, max_step_tokens))
    rows = [1 << i for i in range(_LARGE_STEP.bit_length()) if 1 << i < largest]
    rows += range(2 * _LARGE_STEP, largest, _LARGE_STEP)
    return [StepShape(size, min(size, max(max_running, _LARGE_STEP))) for size in (*rows, largest)]


class _StaticStep:
    """An attention step whose table and slots stay at the same addresses."""

    def __init__(self, backend: TabledAttention, cache: KVCache, slots: torch.Tensor, prepared: object) -> None:
        self._backend, self._cache = backend, cache
        self._slots, self._prepared = slots, prepared

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, params: AttentionParams
    ) -> torch.Tensor:
        keys, values = self._cache.layer(layer)
        self._backend.write(keys, values, self._slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
        return self._backend.attend(query[0].transpose(0, 1), keys, values, params, self._prepared)[None]


Forward = Callable[[torch.Tensor, torch.Tensor, _StaticStep, torch.Tensor], torch.Tensor]
"""ids `[rows]`, positions `[rows]`, the attention step and the rows to keep `[kept]`, all int64 on the device ->
logits `[kept, vocab]`."""


@dataclass(frozen=True, slots=True)
class _Views:
    """Where a shape's inputs lie in a buffer of int64."""

    ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    kept: torch.Tensor
    table: torch.Tensor

    @classmethod
    def of(cls, buffer: torch.Tensor, shape: StepShape) -> _Views:
        table = len(buffer) - 3 * shape.rows - shape.kept
        return cls(*torch.split(buffer, [shape.rows] * 3 + [shape.kept, table]))


Check = Callable[[StepShape, Callable[[StepInputs], torch.Tensor]], str | None]
"""Takes a size and a function that computes a step by its recording; returns what is wrong with it, or None."""


class StepGraphs:
    """The recordings, the memory that their inputs come from, and the logits that they leave."""

    def __init__(
        self,
        forward: Forward,
        backend: TabledAttention,
        cache: KVCache,
        *,
        device: torch.device,
        vocab_size: int,
        most_pages: int,
        shapes: SequenceOf[StepShape],
    ) -> None:
        """Allocate what steps of these shapes, with sequences of `most_pages` pages, need."""
        self._forward, self._backend, self._cache = forward, backend, cache
        self._most_pages, self._shapes = most_pages, sorted(shapes)
        self._replays: dict[StepShape, Replay] = {}
        most_kept = max(shape.kept for shape in shapes)
        size = max(
            3 * shape.rows + shape.kept + backend.table_size(shape.rows, shape.kept, shape.kept * most_pages)
            for shape in shapes
        )
        self._device, cuda = device, device.type == "cuda"
        self._host = torch.zeros(size, dtype=torch.int64, pin_memory=cuda)
        self._inputs = torch.zeros(size, dtype=torch.int64, device=device)
        self._logits = torch.zeros(most_kept, vocab_size, device=device)
        self._copied = torch.cuda.Event() if cuda else None  # type: ignore[no-untyped-call]

    @property
    def shapes(self) -> list[StepShape]:
        """The sizes that are served from recordings, smallest first."""
        return sorted(self._replays)

    def record(self, capture: Capture, check: Check) -> list[str]:
        """Record a step of each shape, and keep the recordings that `check` finds nothing wrong with.

        Returns:
            A sentence for each size that is not served from a recording.
        """
        notes = []
        # The largest is recorded first: the smaller ones then reuse the memory of its pool.
        for shape in reversed(self._shapes):
            try:
                self._put(shape, StepInputs([], [], [], [], []))
                replay = capture(self._computation(shape))
            except Exception as error:  # noqa: BLE001 - whatever a model's code raises, the ordinary path serves
                notes.append(
                    f"steps of up to {shape.rows} tokens can't be recorded as CUDA graphs: {first_line(error)}"
                )
                if isinstance(error, torch.OutOfMemoryError):
                    continue
                break  # the next one would fail for the same reason
            if (complaint := check(shape, partial(self._replay, shape, replay))) is None:
                self._replays[shape] = replay
            else:
                notes.append(f"a CUDA graph of {shape.rows} tokens failed its check and is not used: {complaint}")
        return notes

    def run(self, inputs: StepInputs) -> torch.Tensor | None:
        """The step's logits in float32 `[kept, vocab]`, or None when no recording fits it."""
        for shape in self._shapes:
            if shape in self._replays and self._fits(shape, inputs):
                return self._replay(shape, self._replays[shape], inputs)
        return None

    def reaches(self, tokens: int) -> bool:
        """Whether a recording has room for this many tokens."""
        return any(tokens <= shape.rows for shape in self._replays)

    def _fits(self, shape: StepShape, inputs: StepInputs) -> bool:
        return (
            len(inputs.ids) <= shape.rows
            and max(len(inputs.kept), len(inputs.spans)) <= shape.kept
            and sum(len(span.pages) for span in inputs.spans) <= shape.kept * self._most_pages
        )

    def _computation(self, shape: StepShape) -> Callable[[], torch.Tensor]:
        views = _Views.of(self._inputs, shape)
        prepared = self._backend.view(views.table, shape.rows, shape.kept)
        step = _StaticStep(self._backend, self._cache, views.slots, prepared)
        logits = self._logits[: shape.kept]
        return lambda: logits.copy_(self._forward(views.ids, views.positions, step, views.kept))

    def _replay(self, shape: StepShape, replay: Replay, inputs: StepInputs) -> torch.Tensor:
        self._put(shape, inputs)
        # Copied, since the next replay writes to the same memory.
        return replay()[: len(inputs.kept)].clone()

    def _put(self, shape: StepShape, inputs: StepInputs) -> None:
        """Send the inputs to where the recordings read them. Padding rows write to the cache's last, unused page."""
        if self._copied is not None:
            # Wait until the device has copied the last step's inputs out of the host's buffer.
            self._copied.synchronize()
        views = _Views.of(self._host, shape)
        scratch = (self._cache.num_pages - 1) * self._cache.page_tokens
        for view, numbers, padding in (
            (views.ids, inputs.ids, 0),
            (views.positions, inputs.positions, 0),
            (views.slots, inputs.slots, scratch),
            (views.kept, inputs.kept, 0),
        ):
            array = view.numpy()
            array[: len(numbers)] = numbers
            array[len(numbers) :] = padding
        used = self._backend.fill(views.table.numpy(), inputs.spans, shape.rows, shape.kept)
        end = 3 * shape.rows + shape.kept + used
        self._inputs[:end].copy_(self._host[:end], non_blocking=True)
        if self._copied is not None:
            with torch.cuda.device(self._device):
                self._copied.record()
