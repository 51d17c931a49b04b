"""The seam between a completion and its wire format: deltas in, whole server-sent events out.

Promises that the events depend on the deltas alone, so that another ingress process can write a stream again, event
for event. Knows no replica.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from serve_app.core import RequestError
from serve_app.generation.completion import Usage
from serve_app.generation.text import Delta


class EventWriter(ABC):
    """Writes the events of one completion. Each is whole: its fields and the empty line."""

    @abstractmethod
    def opened(self) -> list[bytes]:
        """The events before the first token."""

    @abstractmethod
    def gained(self, delta: Delta) -> list[bytes]:
        """The events of one delta, which may end its choice."""

    @abstractmethod
    def ended(self, usage: Usage) -> list[bytes]:
        """The events after all choices have ended."""

    @abstractmethod
    def failed(self, error: RequestError) -> bytes:
        """The event of an error that ends the stream."""
