"""The events of one stream as they come to this process, and how readers get them.

Promises that event k is the same for every reader, and that a reader gets the error if no more events can come here.
Knows no replica and no store.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from serve_app.core import Failure, RequestError, TokenBatch
from serve_app.resume.event_log import EventLog, EventMemory, Mark, Replay
from serve_app.resume.refusals import ReaderTooSlow, StreamChanged
from serve_app.resume.transcript import Event, Transcript

PIECE_BYTES = 2**16
"""About how many bytes a reader gets at a time: an answer that is already long goes out in pieces."""


class EventFeed:
    """The feed of one stream: written by its owner or its follower, read by any number of clients."""

    def __init__(self, transcript: Transcript, memory: EventMemory) -> None:
        self.transcript = transcript
        self.events = EventLog(memory)
        self.events.append(transcript.opening())
        self.closed = False
        """No more events come: all are there, or this process neither generates nor follows the stream any more."""
        self.recoveries_s: Sequence[float] = ()
        """How long each interruption took after which another replica went on, as far as this process saw them. They
        are no events: another process, which reads the journal, does not know them."""
        self._trouble: RequestError | None = None
        self._news = asyncio.Event()

    @property
    def finished(self) -> bool:
        """All events are there."""
        return self.transcript.finished

    def push(self, choice: int, batch: TokenBatch) -> None:
        """Add the events of `batch`. Raises `BatchError` and `OtherTokens`."""
        if not self.finished:
            self._add(self.transcript.push(choice, batch))

    def fail(self, failure: Failure) -> None:
        """The stream ends with an error, unless it has ended."""
        if not self.finished:
            self._add(self.transcript.fail(failure))

    def close(self, trouble: RequestError | None = None) -> None:
        """No more events come. `trouble` is raised in readers that have read all events."""
        self.closed = True
        self._trouble = trouble
        self._tell()

    async def check(self, mark: Mark, wait_s: float) -> None:
        """Raise `StreamChanged` if the reader's events are certainly not the beginning of this stream.

        If the reader has more events than this process, wait for them for at most `wait_s`. `read` checks again later.
        """
        try:
            async with asyncio.timeout(wait_s):
                while mark.digest is not None and len(self.events) < mark.position and not self.closed:
                    await self._news.wait()
        except TimeoutError:
            return
        ends_before = self.finished and mark.digest is not None and mark.position > len(self.events)
        if ends_before or self.events.differs(mark):
            raise StreamChanged

    async def read(self, mark: Mark, max_lag_bytes: int) -> AsyncGenerator[tuple[int, list[Event]], None]:
        """(index of the first, events) from the reader's mark on, as they come.

        Raises `StreamChanged` when the reader's events turn out to be of another text, the error that the feed was
        closed with, and `ReaderTooSlow` for a reader that was up to date once and is now more than `max_lag_bytes`
        behind. The events that ended its last wait, which may come all at once, are not counted.
        """
        position, caught_up, at_once_bytes = mark.position, False, 0
        replay: Replay | None = None
        while True:
            news = self._news
            if position < len(self.events):
                if position == mark.position:
                    await self.check(mark, 0)
                if caught_up and self.events.bytes_after(position) > max_lag_bytes + at_once_bytes:
                    raise ReaderTooSlow(max_lag_bytes)
                if position >= self.events.first:
                    replay, events = None, self.events.piece(position, PIECE_BYTES)
                else:
                    replay = replay or Replay(self.transcript.again())
                    events = await replay.piece(position, PIECE_BYTES)
                yield position, events
                position += len(events)
            elif self.closed:
                if self._trouble is not None:
                    raise self._trouble
                await self.check(mark, 0)
                return
            else:
                caught_up, replay = True, None
                await news.wait()
                # 0 for a reader that still has more events than this process.
                at_once_bytes = self.events.bytes_after(position)

    def _add(self, events: Sequence[Event]) -> None:
        self.events.append(events)
        self._tell()

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()
