"""The events of one stream at one ingress, by number, and what a reader has of them.

Promises that what two readers have is told apart as soon as one token of it differs. Knows no text and no replica.
"""

from __future__ import annotations

from array import array
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass

from serve_app.streams.transcript import Event


@dataclass(frozen=True, slots=True)
class Mark:
    """Where a reader stands: how many events it has, and of which text they are."""

    position: int = 0
    digest: int | None = None
    """Of the tokens up to there, as `Event.digest`; None: unknown."""


class EventLog:
    """All events so far."""

    def __init__(self) -> None:
        self._events: list[bytes] = []
        self._ends = array("Q", [0])
        """Bytes of the first k events."""
        self._digests = array("I", [0])
        """After the first k events."""

    def __len__(self) -> int:
        return len(self._events)

    def append(self, events: Sequence[Event]) -> None:
        """Add these after the others."""
        for content, digest in events:
            self._events.append(content)
            self._ends.append(self._ends[-1] + len(content))
            self._digests.append(digest)

    def piece(self, start: int, size_bytes: int) -> list[Event]:
        """Events from number `start` on, of about `size_bytes` together; at least one where there is one."""
        end = max(start + 1, bisect(self._ends, self._ends[start] + size_bytes) - 1)
        return [
            Event(content, digest)
            for content, digest in zip(self._events[start:end], self._digests[start + 1 : end + 1], strict=True)
        ]

    def bytes_after(self, position: int) -> int:
        """Of the events from this one on; 0 for one that is not there yet."""
        return self._ends[-1] - self._ends[min(position, len(self))]

    def differs(self, mark: Mark) -> bool:
        """Whether the reader's events are certainly not the beginning of these."""
        return mark.digest is not None and mark.position <= len(self) and self._digests[mark.position] != mark.digest
