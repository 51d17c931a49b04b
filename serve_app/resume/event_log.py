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
"""Of events that a stream keeps whatever the limits: a reader that is up to date must find what has just come. Some
hundred streams in progress keep less than 10 MiB by it."""
_REPLAYED_AT_ONCE = 32
"""Events that are made again between two turns of the event loop: about 1 ms."""
_ROOM = 1 / 8
"""Share of a limit that is made free at a time, so that it isn't reached again with the next event."""


@dataclass(frozen=True, slots=True)
class Mark:
    """Where a reader stands: how many events it has, and of which text they are."""

    position: int = 0
    digest: int | None = None
    """Of the tokens up to there, as `Event.digest`; None: unknown."""


class EventMemory:
    """What the events of all streams of a process may take. It forgets the oldest events of those that keep most."""

    def __init__(self, max_bytes: int, max_log_bytes: int) -> None:
        """`max_log_bytes`: of one stream."""
        self.max_log_bytes = max_log_bytes
        self._max_bytes = max_bytes
        self.logs: WeakSet[EventLog] = WeakSet()
        """Those that are counted: each as long as anybody holds it."""
        self._room_bytes = max_bytes
        """That may be added before all are measured again."""

    @property
    def kept_bytes(self) -> int:
        """Of all streams that somebody generates, follows or reads here."""
        return sum(log.kept_bytes for log in self.logs)

    def grew(self, size_bytes: int) -> None:
        """A log has become larger by so much."""
        self._room_bytes -= size_bytes
        if self._room_bytes < 0:
            self._make_room()

    def _make_room(self) -> None:
        kept_bytes, wanted_bytes = self.kept_bytes, int(self._max_bytes * (1 - _ROOM))
        while kept_bytes > wanted_bytes:
            largest = max(self.logs, key=lambda log: log.kept_bytes)
            forgotten_bytes = largest.forget(largest.kept_bytes // 2)
            if not forgotten_bytes:  # all keep only their newest
                break
            kept_bytes -= forgotten_bytes
        self._room_bytes = max(NEWEST_BYTES, self._max_bytes - kept_bytes)


class EventLog:
    """All events so far are counted, the newest are kept. Older ones can be made again: see `Transcript.again`."""

    def __init__(self, memory: EventMemory) -> None:
        self.first = 0
        """Number of the first event that is kept."""
        self._memory = memory
        self._kept: list[bytes] = []
        self._ends = array("Q", [0])
        """Bytes of the first k events."""
        self._digests = array("I", [0])
        """After the first k events."""
        memory.logs.add(self)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @property
    def kept_bytes(self) -> int:
        """Of the events that are kept."""
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
        """Keep so much less, but always the newest events; how much less it is then."""
        before = self.first
        wanted = bisect_left(self._ends, self._ends[before] + size_bytes)
        newest = bisect(self._ends, self._ends[-1] - NEWEST_BYTES) - 1
        self.first = max(before, min(wanted, newest))
        del self._kept[: self.first - before]
        return self._ends[self.first] - self._ends[before]

    def piece(self, start: int, size_bytes: int) -> list[Event]:
        """Events from number `start` on, which are kept, of about `size_bytes` together; at least one if there is."""
        end = max(start + 1, bisect(self._ends, self._ends[start] + size_bytes) - 1)
        contents = self._kept[start - self.first : end - self.first]
        return [Event(*pair) for pair in zip(contents, self._digests[start + 1 : end + 1], strict=True)]

    def bytes_after(self, position: int) -> int:
        """Of the events from this one on; 0 for one that is not there yet."""
        return self._ends[-1] - self._ends[min(position, len(self))]

    def differs(self, mark: Mark) -> bool:
        """Whether the reader's events are certainly not the beginning of these."""
        return mark.digest is not None and mark.position <= len(self) and self._digests[mark.position] != mark.digest


class Replay:
    """Events that are no longer kept, made again one after the other for one reader."""

    def __init__(self, events: Iterator[Event]) -> None:
        self._events = enumerate(events, 1)

    async def piece(self, start: int, size_bytes: int) -> list[Event]:
        """As `EventLog.piece`; `start` is what the piece before ended with. Lets others run meanwhile.

        Raises `LookupError` when the transcript has no such event, which would be its mistake.
        """
        found: list[Event] = []
        found_bytes = 0
        for position, event in self._events:
            if position > start:
                found.append(event)
                found_bytes += len(event.content)
            if found_bytes >= size_bytes:
                break
            if position % _REPLAYED_AT_ONCE == 0:
                await asyncio.sleep(0)
        if not found:
            raise LookupError(f"event {start} is not made again")
        return found
