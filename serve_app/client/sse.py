"""Server-Sent Events out of a byte stream, by the WHATWG's rules.

Promises the same events however the bytes are cut into chunks: inside a UTF-8 character, or between CR and LF.
Knows nothing of what the events mean. Source: https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass

_LINE_END = re.compile(r"\r\n|\r|\n")


@dataclass(frozen=True, slots=True)
class Event:
    """One dispatched event."""

    data: str
    event: str = "message"
    id: str = ""
    """The last id seen in the stream, this event's or an earlier one's."""


class EventParser:
    """Feed it bytes as they come; it yields each event when its closing empty line has arrived."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("replace")  # the BOM is dropped, as the rules say
        self._partial: list[str] = []
        self._after_cr = False
        self._event = ""
        self._data: list[str] = []
        self._id = ""

    def feed(self, chunk: bytes) -> Iterator[Event]:
        """Yield the events that `chunk` completes. What is incomplete when the stream ends is dropped."""
        text = self._decoder.decode(chunk)
        if not text:
            return
        if self._after_cr and text[0] == "\n":  # the second half of a CRLF: its CR has ended the line already
            text = text[1:]
            self._after_cr = False
            if not text:
                return
        self._after_cr = text[-1] == "\r"
        *lines, rest = _LINE_END.split(text)
        for line in lines:
            complete = "".join([*self._partial, line])
            self._partial.clear()
            event = self._take(complete)
            if event is not None:
                yield event
        self._partial.append(rest)

    def _take(self, line: str) -> Event | None:
        """One line without its end: a field, a comment, or the empty line that dispatches."""
        if not line:
            data, event = self._data, self._event
            self._data, self._event = [], ""
            return Event("\n".join(data), event or "message", self._id) if data else None
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._event = value
        elif name == "id" and "\0" not in value:
            self._id = value
        return None  # comments (empty names), `retry` and unknown fields say nothing to this client
