"""The seam between a completion and its wire format: what choices gain in, whole server-sent events out.

Promises that events are a function of what the choices gain and of nothing else, so that a stream can be written
again, event for event, at another ingress. Knows no replica.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from serve_app.api.errors import ApiError
from serve_app.chat.tokenizer import ChatTokenizer
from serve_app.generation.service import Completion, Plan, Usage
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

    @staticmethod
    @abstractmethod
    def failed(error: ApiError) -> bytes:
        """The stream ends with an error."""


@dataclass(frozen=True, slots=True)
class WireFormat:
    """How one endpoint streams. `fields` is JSON: what the writer needs besides the plan."""

    name: str
    writer: Callable[[Plan, Mapping[str, Any], ChatTokenizer], EventWriter]
    failed: Callable[[ApiError], bytes]
    """As the writer's."""


async def events_of(completion: Completion, writer: EventWriter) -> AsyncGenerator[bytes, None]:
    """The events of a completion that nobody else reads, joined as they come. Raises `ApiError`."""
    started = False
    async with completion, aclosing(completion.deltas()) as deltas:
        async for delta in deltas:
            events = writer.gained(delta)
            yield b"".join(events if started else [*writer.opened(), *events])
            started = True
        yield b"".join(writer.ended(completion.usage))
