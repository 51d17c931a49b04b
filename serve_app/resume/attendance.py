"""Counts the readers of a stream at this ingress, and says how long to generate without one. Knows no events."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Attendance:
    """The readers of one stream at one ingress."""

    def __init__(self, grace_s: float, changed: Callable[[], None]) -> None:
        """`grace_s`: how long a stream goes on without a reader. `changed`: called whenever `patience_s` may differ."""
        self._grace_s = grace_s
        self._changed = changed
        self._loop = asyncio.get_running_loop()
        self._given_up = False
        self.readers = 0
        self.left_at = self._loop.time()
        """When the last reader went, by the loop's clock; at first when the stream was made."""

    @contextmanager
    def attended(self) -> Iterator[None]:
        """A reader is here for as long as the block runs."""
        self.readers += 1
        self._given_up = False
        self._changed()
        try:
            yield
        finally:
            self.readers -= 1
            self.restart()

    def restart(self) -> None:
        """The time without a reader counts from now."""
        self.left_at = self._loop.time()
        self._changed()

    def give_up(self) -> None:
        """Stop generating as soon as there is no reader."""
        self._given_up = True
        self._changed()

    def patience_s(self, read_elsewhere_at: float | None) -> float:
        """Seconds to go on without a reader here. `read_elsewhere_at`: when another ingress last read; None: never."""
        if self._given_up:
            return 0.0
        last_read = self.left_at if read_elsewhere_at is None else max(self.left_at, read_elsewhere_at)
        return last_read + self._grace_s - self._loop.time()
