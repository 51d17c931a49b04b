"""The seam between a completion and its wire format: what choices gain in, whole server-sent events out.

Promises that events are a function of what the choices gain and of nothing else, so that a stream can be written
again, event for event, by another ingress process. Knows no replica.
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
        """Before the first token."""

    @abstractmethod
    def gained(self, delta: Delta) -> list[bytes]:
        """A choice has gained something, or has ended."""

    @abstractmethod
    def ended(self, usage: Usage) -> list[bytes]:
        """All choices have ended."""

    @abstractmethod
    def failed(self, error: RequestError) -> bytes:
        """The stream ends with an error."""
