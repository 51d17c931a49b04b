"""The events that httpx-sse makes of a stream: the WHATWG's rules, as both clients rely on them.

Source: https://html.spec.whatwg.org/multipage/server-sent-events.html. httpx-sse breaks two of its rules, which does no
harm here: it does not drop a byte order mark, which serve_app never sends, and it yields events without data, which
`protocol.read_event` ignores.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import httpx
import httpx_sse
import pytest
from hypothesis import given
from hypothesis import strategies as st

Event = tuple[str, str, str]
"""Its name, data and id."""


def parse(*chunks: bytes) -> list[Event]:
    """Events with data, as `protocol.read_event` takes them."""

    class Body(httpx.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            yield from chunks

    response = httpx.Response(200, headers={"content-type": "text/event-stream; charset=utf-8"}, stream=Body())
    events = httpx_sse.EventSource(response).iter_sse()
    return [(event.event, event.data, event.id) for event in events if event.data]


def message(data: str, event: str = "message", id: str = "") -> Event:
    return event, data, id


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b"data: one\n\n", [message("one")]),
        (b"data:one\n\n", [message("one")]),
        (b"data:  one\n\n", [message(" one")]),
        (b"data\n\n", []),
        (b"data: a\ndata: b\n\n", [message("a\nb")]),
        (b"data: a\r\ndata: b\r\n\r\n", [message("a\nb")]),
        (b"data: a\rdata: b\r\r", [message("a\nb")]),
        (b"event: done\ndata: x\n\ndata: y\n\n", [message("x", "done"), message("y")]),
        (b"id: 4\ndata: x\n\ndata: y\n\n", [message("x", id="4"), message("y", id="4")]),
        (b"id: 4\ndata: x\n\nid: 5\0\ndata: y\n\n", [message("x", id="4"), message("y", id="4")]),
        (b": ping\n\ndata: x\n\n", [message("x")]),
        (b": ping\ndata: x\n\n", [message("x")]),
        (b"id: 4\ndata: x\n\n: ping\n\ndata: y\n\n", [message("x", id="4"), message("y", id="4")]),
        (b"retry: 10\n\nevent: lone\n\ndata: x\n\n", [message("x")]),
        ("data: a\u2028b\x0bc\x85d\n\n".encode(), [message("a\u2028b\x0bc\x85d")]),
        (b"data: \xff\n\n", [message("\ufffd")]),
        (b"data: never ended\n", []),
        (b"data: x\n\ndata: y", [message("x")]),
        (b"", []),
    ],
)
def test_streams(stream: bytes, events: list[Event]) -> None:
    assert parse(stream) == events
    assert parse(*(stream[at : at + 1] for at in range(len(stream)))) == events


TEXT = st.text(st.characters(exclude_characters="\r\n\0", exclude_categories=["Cs"]), max_size=8)


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, list[Event]]:
    """A valid stream with its events, each line with a line ending of its own."""
    lines: list[str] = []
    events: list[Event] = []
    last_id = ""
    for _ in range(draw(st.integers(0, 4))):
        data = draw(st.lists(TEXT, min_size=1, max_size=3))
        name = draw(st.sampled_from(["", "done", "error"]))
        if draw(st.booleans()):
            last_id = draw(TEXT)
            lines.append(f"id: {last_id}")
        lines += [f": {draw(TEXT)}"] if draw(st.booleans()) else []
        lines += [f"event: {name}"] if name else []
        lines += [f"data: {line}" for line in data]
        lines.append("")
        if any(data) or len(data) > 1:
            events.append(message("\n".join(data), name or "message", last_id))
    ends = draw(st.lists(st.sampled_from(["\n", "\r", "\r\n"]), min_size=len(lines), max_size=len(lines)))
    # A lone CR before a line that begins with LF would read as one CRLF: an empty line may then end only in CR or CRLF.
    for index in range(1, len(lines)):
        if ends[index - 1] == "\r" and not lines[index]:
            ends[index] = "\r"
    return "".join(line + end for line, end in zip(lines, ends, strict=True)).encode(), events


@given(streams(), st.data())
def test_any_cut_gives_the_same_events(stream: tuple[bytes, list[Event]], data: st.DataObject) -> None:
    content, events = stream
    cuts = sorted(data.draw(st.sets(st.integers(0, len(content)), max_size=12)))
    bounds = [0, *cuts, len(content)]
    assert parse(*(content[start:end] for start, end in pairwise(bounds))) == events


@given(st.lists(st.binary(max_size=40), max_size=8))
def test_no_bytes_make_it_fail(chunks: list[bytes]) -> None:
    assert parse(*chunks) == parse(b"".join(chunks))
