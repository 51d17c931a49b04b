"""The errors of building and running an engine. Each message is one sentence for the operator of the replica."""

from __future__ import annotations


class EngineError(Exception):
    """The engine can't serve this model or has stopped serving it. The message says what to do."""


class UnsupportedModelError(EngineError):
    """The model does something the paged attention path can't reproduce. It is refused, never served wrongly."""
