"""Where a resumable stream stands, and whether to go on after an error: for both clients, without doing any I/O.

Promises that every event is taken once, and that attempts without progress are bounded.
"""

from __future__ import annotations

from collections.abc import Mapping

from serve_app.client.errors import BadRequest, ConnectionLost, ServeAppError, ServerError, StreamError
from serve_app.client.protocol import backoff_s

SILENCE_S = 30.0
"""A connection without a byte for this long is dead: the server sends a heartbeat each 10 s."""
ATTEMPTS = 10
"""Most attempts in a row without a new event. The pauses between them are about 25 s together."""
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0
_PASSING = frozenset({"slow_reader", "journal_unavailable"})
"""Codes of errors after which the stream may still be there to be resumed."""


class Position:
    """How far one stream has been read."""

    def __init__(self) -> None:
        self._stream_id: str | None = None
        self._last_event_id = ""
        """As the server gave it: only the server knows what it means."""
        self._failures = 0
        self._events = 0

    @property
    def is_fresh(self) -> bool:
        """No event has come."""
        return self._events == 0

    @property
    def path(self) -> str:
        """The URL path of the rest of the stream."""
        return f"/v1/streams/{self._stream_id}"

    @property
    def headers(self) -> dict[str, str]:
        """What to send for the rest of the stream."""
        return {"Last-Event-ID": self._last_event_id} if self._last_event_id else {}

    def began(self, headers: Mapping[str, str]) -> None:
        """Take the stream's id from the headers of a response."""
        self._stream_id = headers.get("x-stream-id", self._stream_id)

    def take(self, event_id: str) -> bool:
        """Whether the event with this id is new, and so to be delivered. An event without an id counts as new."""
        if event_id and event_id == self._last_event_id:
            return False
        self._last_event_id = event_id or self._last_event_id
        self._failures = 0
        self._events += 1
        return True

    def pause_s(self, error: ServeAppError) -> float | None:
        """Seconds to wait before the next attempt, or None when `error` ends the stream."""
        if self._stream_id is None or not _may_pass(error):
            return None
        self._failures += 1
        if self._failures > ATTEMPTS:
            return None
        return backoff_s(error, self._failures, FIRST_PAUSE_S, LONGEST_PAUSE_S)


def _may_pass(error: ServeAppError) -> bool:
    """Whether the stream may still be there after this error."""
    if isinstance(error, StreamError):
        return error.code in _PASSING
    if isinstance(error, BadRequest):
        return error.status == 404 and error.code is None  # from a proxy that has just started, and has no routes yet
    if isinstance(error, ServerError):
        return error.status is not None and error.status >= 500
    return isinstance(error, ConnectionLost)
