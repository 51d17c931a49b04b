"""The seam between a resumable stream and what it says: ids in, numbered events out.

Implemented by `serve_app.api.transcript`, where text and wire formats live, and by fakes in tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from serve_app.core import Failure, TokenBatch


class Event(NamedTuple):
    """One event, as a client gets it."""

    content: bytes
    digest: int
    """Of all tokens that were told up to here, 32 bits, rolling: equal where two texts are, else hardly ever."""


class Transcript(Protocol):
    """What a stream says, as events: a pure function of the ids, in whatever batches they come."""

    @property
    def finished(self) -> bool:
        """Nothing more can come."""
        ...

    @property
    def tokens(self) -> int:
        """Of all choices, so far."""
        ...

    @property
    def outcome(self) -> str:
        """For the log: the finish reason or error code that came last."""
        ...

    @property
    def cached_prompt_tokens(self) -> int:
        """For the log: prompt tokens that the replicas found in their caches."""
        ...

    def opening(self) -> list[Event]:
        """The events before the first token."""
        ...

    def push(self, choice: int, batch: TokenBatch) -> list[Event]:
        """The events that `batch` adds; tokens that are known are dropped.

        Raises `JournalError` for a gap, and `OtherTokens` where known ones are others.
        """
        ...

    def fail(self, failure: Failure) -> list[Event]:
        """The stream ends with an error: its events."""
        ...

    def again(self) -> Iterator[Event]:
        """All events so far from the first on, made again as they are taken; also those that come meanwhile."""
        ...

    def ended(self, choice: int) -> bool:
        """Whether this choice has said all."""
        ...

    def output(self, choice: int) -> TokenBatch:
        """All tokens of this choice so far, and the counters that came with its first ones."""
        ...
