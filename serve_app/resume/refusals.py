"""The errors with which a resumable stream can't begin or can't continue. `StoreUnavailable` is in `journal_store`.

RequestError
├── Refused            no replica has accepted a new stream
├── JournalsFull       the store has no room for another stream
├── TooManyInBackground  this process generates as many streams in the background as it may
├── StreamGone         there is no such stream
│   └── StreamChanged  the events that the client has are not the beginning of this stream
├── OwnerSilent        who generates the stream does not end it
└── ReaderTooSlow      the client reads too slowly
"""

from __future__ import annotations

from serve_app.core import FailureCode, RequestError


class Refused(RequestError):
    """A new stream ended before a replica had accepted it."""


class JournalsFull(RequestError):
    """The store has no room for another stream."""

    def __init__(self) -> None:
        message = "The limit of resumable streams is reached; try again later, or without X-Stream-Resume."
        super().__init__(message, code=FailureCode.OVERLOADED)


class TooManyInBackground(RequestError):
    """This process generates as many streams in the background as it may."""

    def __init__(self, limit: int) -> None:
        message = f"The limit of {limit} background responses is reached; try again later, or without background."
        super().__init__(message, code=FailureCode.OVERLOADED)


class StreamGone(RequestError):
    """There is no such stream: it never was, it has expired, or its journal was lost."""

    def __init__(
        self,
        message: str = "There is no such stream: it expired, its journal was lost, or it never existed. "
        "Send the request again.",
        code: str = "stream_gone",
    ) -> None:
        super().__init__(message, code=code)


class StreamChanged(StreamGone):
    """The reader's events are not the beginning of this stream: its end was generated again, with other tokens."""

    def __init__(self) -> None:
        super().__init__(
            "The events that you have are not the beginning of this stream: part of it was generated again, with other "
            "tokens, after its replica died. Send the request again.",
            "stream_changed",
        )


class OwnerSilent(RequestError):
    """A stream was to end, and the process that generates it did not react."""

    def __init__(self) -> None:
        message = "The server that generates this does not react; it ends it as soon as it does. Try again in a moment."
        super().__init__(message, code="journal_unavailable", retry_after_s=2.0)


class ReaderTooSlow(RequestError):
    """A reader has left too much of its stream unread."""

    def __init__(self, max_unread_bytes: int) -> None:
        message = f"The stream was ended because the client left more than {max_unread_bytes} bytes unread."
        super().__init__(message, code="slow_reader")
