"""The errors of building and running an engine. Each message is one sentence for the operator of the replica."""

from __future__ import annotations


class EngineError(Exception):
    """The engine can't serve this model or has stopped serving it. The message says what to do."""


class UnsupportedModelError(EngineError):
    """The model does something the paged attention path can't reproduce. It is refused, never served wrongly."""


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its type when the message is empty."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
