"""The newest events of one stream at one ingress, by number, and the position of a reader.

Promises a limit in bytes for one stream and for all streams of a process, and a different digest as soon as one token
differs. Knows no text and no replica.
"""

from __future__ import annotations

import asyncio
from array import array
from bisect import bisect, bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from weakref import WeakSet

from serve_app.resume.transcript import Event

NEWEST_BYTES = 2**14
"""Bytes of its newest events that a stream keeps whatever the limits: a reader that is up to date must find the events
that have just come. Some hundred streams in progress keep less than 10 MiB this way."""
_REPLAYED_AT_ONCE = 32
"""Events that `Replay` makes before it lets the event loop run: about 1 ms."""
_REPLAYED_BYTES = 2**14
"""Bytes of events after which it does so too: those with logprobs are long."""
_ROOM = 1 / 8
"""Share of a limit that is freed when it is reached, so that the next event does not reach it again."""


@dataclass(frozen=True, slots=True)
class Mark:
    """Where a reader stands: how many events it has, and a digest of their tokens."""

    position: int = 0
    digest: int | None = None
    """The `Event.digest` of the last event that it has; None: unknown."""


class EventMemory:
    """Limits the memory for the events of all streams of a process.

    When the limit is reached, the streams that keep most forget their oldest events.
    """

    def __init__(self, max_bytes: int, max_log_bytes: int) -> None:
        """`max_bytes`: for all streams together; `max_log_bytes`: for one stream."""
        self.max_log_bytes = max_log_bytes
        self._max_bytes = max_bytes
        self.logs: WeakSet[EventLog] = WeakSet()
        """The logs that are counted: each as long as there is a reference to it."""
        self._room_bytes = max_bytes
        """Bytes that may be added before all logs are measured again."""

    @property
    def kept_bytes(self) -> int:
        """Bytes of the events that are kept for all streams generated, followed or read here."""
        return sum(log.kept_bytes for log in self.logs)

    def grew(self, size_bytes: int) -> None:
        """A log has grown by `size_bytes`: make room if that is too much."""
        self._room_bytes -= size_bytes
        if self._room_bytes < 0:
            self._make_room()

    def _make_room(self) -> None:
        kept_bytes, wanted_bytes = self.kept_bytes, int(self._max_bytes * (1 - _ROOM))
        while kept_bytes > wanted_bytes:
            largest = max(self.logs, key=lambda log: log.kept_bytes)
            forgotten_bytes = largest.forget(largest.kept_bytes // 2)
            if not forgotten_bytes:  # every log keeps only its newest events
                break
            kept_bytes -= forgotten_bytes
        self._room_bytes = max(NEWEST_BYTES, self._max_bytes - kept_bytes)


class EventLog:
    """The events of one stream: counts all, keeps the newest. Older ones can be made again: see `Transcript.again`."""

    def __init__(self, memory: EventMemory) -> None:
        self.first = 0
        """Number of the first event that is kept."""
        self._memory = memory
        self._kept: list[bytes] = []
        self._ends = array("Q", [0])
        """At index k: bytes of the first k events."""
        self._digests = array("I", [0])
        """At index k: the digest after the first k events."""
        memory.logs.add(self)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @property
    def kept_bytes(self) -> int:
        """Bytes of the events that are kept."""
        return self._ends[-1] - self._ends[self.first]

    def append(self, events: Sequence[Event]) -> None:
        """Add these after the others."""
        before_bytes = self._ends[-1]
        for content, digest in events:
            self._kept.append(content)
            self._ends.append(self._ends[-1] + len(content))
            self._digests.append(digest)
        self._memory.grew(self._ends[-1] - before_bytes)
        limit_bytes = self._memory.max_log_bytes
        if self.kept_bytes > limit_bytes:
            self.forget(self.kept_bytes - int(limit_bytes * (1 - _ROOM)))

    def forget(self, size_bytes: int) -> int:
        """Forget the oldest events, `size_bytes` or more, but keep the last `NEWEST_BYTES`. Returns the bytes freed."""
        before = self.first
        wanted = bisect_left(self._ends, self._ends[before] + size_bytes)
        newest = bisect(self._ends, self._ends[-1] - NEWEST_BYTES) - 1
        self.first = max(before, min(wanted, newest))
        del self._kept[: self.first - before]
        return self._ends[self.first] - self._ends[before]

    def piece(self, start: int, size_bytes: int) -> list[Event]:
        """Kept events from number `start` on: at most `size_bytes` together, but at least one event if there is one."""
        end = max(start + 1, bisect(self._ends, self._ends[start] + size_bytes) - 1)
        contents = self._kept[start - self.first : end - self.first]
        return [Event(*pair) for pair in zip(contents, self._digests[start + 1 : end + 1], strict=True)]

    def bytes_after(self, position: int) -> int:
        """Bytes of the events from number `position` on; 0 if that one is not there yet."""
        return self._ends[-1] - self._ends[min(position, len(self))]

    def differs(self, mark: Mark) -> bool:
        """Whether the reader's events are certainly not the beginning of these."""
        return mark.digest is not None and mark.position <= len(self) and self._digests[mark.position] != mark.digest


class Replay:
    """Events that are no longer kept, made again one after the other for one reader."""

    def __init__(self, events: Iterator[Event]) -> None:
        self._events = enumerate(events, 1)

    async def piece(self, start: int, size_bytes: int) -> list[Event]:
        """Events from number `start` on, about `size_bytes` together. Lets other tasks run meanwhile.

        `start` must be where the last piece ended. Raises `LookupError` if the transcript does not make this event
        again, which would be a bug.
        """
        found: list[Event] = []
        found_bytes = made_bytes = 0
        for position, event in self._events:
            made_bytes += len(event.content)
            if position > start:
                found.append(event)
                found_bytes += len(event.content)
            if found_bytes >= size_bytes:
                break
            if position % _REPLAYED_AT_ONCE == 0 or made_bytes >= _REPLAYED_BYTES:
                made_bytes = 0
                await asyncio.sleep(0)
        if not found:
            raise LookupError(f"event {start} is not made again")
        return found
