"""The inputs of a step as numbers on the host, made from the scheduler's chunks."""

from __future__ import annotations

from dataclasses import dataclass

from serve_app.engine.attention.base import Span


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The tokens of a step, one row each, in the order of the spans."""

    ids: list[int]
    positions: list[int]
    slots: list[int]
    """Where each token's key and value go: page * page_tokens + place."""
    spans: list[Span]
    kept: list[int]
    """Indices of the rows whose logits the step returns."""
