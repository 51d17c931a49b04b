"""Compares a recorded step with the ordinary one, before it may serve.

The compared steps have other ids, positions, pages, sequences and padding than the recorded one. Their logits, the most
likely tokens and the writes to the KV cache must agree, and nothing else may be written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from serve_app.engine.attention.base import Span, contiguous_runs
from serve_app.engine.cuda.graphs import StepShape
from serve_app.engine.inputs import StepInputs
from serve_app.engine.kv_cache import KVCache

TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest |a - b| / |b| of a row. With padding, libraries may choose other kernels; wrong pages give 0.3 and more."""
_MOST_CONTEXT = 4096
_MOST_PAGES = 1024
"""The check uses at most this many pages of the KV cache."""

Compute = Callable[[StepInputs], torch.Tensor]


@dataclass(frozen=True, slots=True)
class RecordingCheck:
    """Compares recordings with `ordinary`, in a KV cache that holds nothing yet. Leaves the cache filled with zeros."""

    ordinary: Compute
    cache: KVCache
    layers: tuple[int, ...]
    vocab_size: int
    context_tokens: int
    batch_invariant: bool
    """Whether the same bits are required, instead of numbers within `TOLERANCE`."""

    def __call__(self, shape: StepShape, recorded: Compute) -> str | None:
        """What is wrong with the recording of this shape, or None."""
        for inputs in self._steps(shape):
            try:
                if (complaint := self._differs(inputs, recorded)) is not None:
                    return f"{complaint} ({len(inputs.spans)} sequences, {len(inputs.ids)} tokens)"
            finally:
                for stored in self._stored():
                    stored.zero_()
        return None

    @property
    def _pages(self) -> int:
        return min(self.cache.num_pages - 1, _MOST_PAGES)

    def _steps(self, shape: StepShape) -> Iterator[StepInputs]:
        """Steps that are full or partly padding, with decodes, with one long chunk, or with both."""
        rows, most = shape.rows, min(shape.kept, shape.rows, self._pages)
        cases = {(rows, most), (rows - rows // 3, max(1, most // 2)), (rows, 1), (min(rows, most), min(rows, most))}
        for number, (tokens, sequences) in enumerate(sorted(cases)):
            if (inputs := self._step(tokens, sequences, number)) is not None:
                yield inputs

    def _step(self, tokens: int, sequences: int, number: int) -> StepInputs | None:
        """The first sequence computes all tokens but one for each of the others; None when the cache is too small."""
        page_tokens = self.cache.page_tokens
        generator = torch.Generator().manual_seed(number)
        free = torch.randperm(self._pages, generator=generator).tolist()
        each = len(free) // sequences
        ids = torch.randint(self.vocab_size, (tokens,), generator=generator).tolist()
        inputs = StepInputs(ids, [], [], [], [])
        for sequence in range(sequences):
            new = tokens - sequences + 1 if sequence == 0 else 1
            most = min(self.context_tokens, each * page_tokens, new + _MOST_CONTEXT)
            if most < new:
                return None
            kv_len = int(torch.randint(new, most + 1, (1,), generator=generator))
            pages = tuple(free.pop() for _ in range(-(-kv_len // page_tokens)))
            runs = contiguous_runs(pages, kv_len, page_tokens)
            inputs.spans.append(Span(len(inputs.positions), new, kv_len, runs, pages))
            for position in range(kv_len - new, kv_len):
                inputs.positions.append(position)
                inputs.slots.append(pages[position // page_tokens] * page_tokens + position % page_tokens)
            inputs.kept.append(len(inputs.positions) - 1)
        return inputs

    def _stored(self) -> Iterator[torch.Tensor]:
        """Keys and values of each layer, in the pages that the check uses."""
        for layer in self.layers:
            for stored in self.cache.layer(layer):
                yield stored[: self._pages]

    def _differs(self, inputs: StepInputs, recorded: Compute) -> str | None:
        for number, stored in enumerate(self._stored()):
            stored.normal_(generator=torch.Generator(stored.device).manual_seed(number))
        keys = next(self._stored())
        before = keys.clone()
        found = recorded(inputs)
        slots = torch.tensor(inputs.slots, device=keys.device)
        touched = (keys != before).flatten(0, 1).flatten(1).any(dim=1)
        touched[slots] = False
        if bool(touched.any()):
            return "it writes to pages of other sequences"
        written = self._take(slots)
        expected = self.ordinary(inputs)
        if self.batch_invariant:
            same = torch.equal(found, expected) and all(map(torch.equal, written, self._take(slots)))
            return None if same else "its bits differ from the ordinary step's"
        worst = max(_difference(a, b) for a, b in zip((found, *written), (expected, *self._take(slots)), strict=True))
        tolerance = max(TOLERANCE.get(stored.dtype, TOLERANCE[torch.bfloat16]) for stored in written)
        if not worst <= tolerance:  # NaN too
            return f"it differs from the ordinary step by {worst:.2g} (at most {tolerance:g} is allowed)"
        chosen = expected.gather(1, found.argmax(dim=1, keepdim=True))[:, 0]
        gap = ((expected.amax(dim=1) - chosen) / expected.abs().amax(dim=1)).max()
        return None if gap <= tolerance else "it names other tokens than the ordinary step"

    def _take(self, slots: torch.Tensor) -> list[torch.Tensor]:
        """Copies of each layer's keys and values at these slots, which are then set to zero."""
        taken = []
        for stored in self._stored():
            flat = stored.view(-1, *stored.shape[2:])
            taken.append(flat[slots])
            flat[slots] = 0.0
        return taken


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.float().flatten(1), expected.float().flatten(1)
    return float(((found - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-20)).max())
