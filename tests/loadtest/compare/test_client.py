"""The load generator: what counts as a piece, and that an answer which isn't whole is never a figure."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import fake_openai_server
import pytest

from loadtest.compare.client import Load, RequestFailed, Stream, drive, note_line
from loadtest.compare.servers import Command, Server
from loadtest.service import free_port

SAY = [{"role": "user", "content": "say"}]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    program = [sys.executable, str(Path(fake_openai_server.__file__)), str(port)]
    command = Command(program, {}, "/health", 30)
    with Server(command, f"http://127.0.0.1:{port}", tmp_path_factory.mktemp("log") / "log") as server:
        yield server.url


def line(**event: object) -> bytes:
    return b"data: " + json.dumps(event).encode() + b"\n"


def piece(text: str | None) -> bytes:
    return line(choices=[{"index": 0, "delta": {"content": text}}], usage=None)


def test_pieces_are_the_events_that_bring_text() -> None:
    stream = Stream(0.0)
    role = line(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}}])
    ending = line(choices=[{"index": 0, "delta": {}, "finish_reason": "length"}])
    lines = [role, b"\n", b": ping\n", piece("He"), b"\n", piece(None), piece("llo"), ending, b"data: [DONE]\n"]
    assert [note_line(stream, each, float(now)) for now, each in enumerate(lines)].count(True) == 2
    assert (stream.text, stream.arrivals_s) == ("Hello", [3.0, 6.0])


def test_usage_may_come_with_the_last_choice_or_after_it() -> None:
    usage = {"prompt_tokens": 7, "completion_tokens": 3}
    for choices in ([], [{"index": 0, "delta": {}, "finish_reason": "length"}]):
        stream = Stream(0.0)
        assert not note_line(stream, line(choices=choices, usage=usage), 1.0)
        assert (stream.prompt_tokens, stream.completion_tokens) == (7, 3)


def test_an_error_event_fails_the_request() -> None:
    with pytest.raises(RequestFailed, match="out of memory"):
        note_line(Stream(0.0), line(error={"message": "out of memory"}), 1.0)


async def test_answers_come_in_the_order_of_their_chats(url: str) -> None:
    chats = [SAY, [*SAY, *SAY], SAY]
    streams = await drive(Load(url, {"model": "x"}, 5), chats, 2)
    assert [stream.prompt_tokens for stream in streams] == [1, 2, 1]
    assert {stream.text for stream in streams} == {"<0><1><2><3><4>"}
    assert len({stream.digest for stream in streams}) == 1
    for stream in streams:
        assert len(stream.arrivals_s) == 5
        assert stream.started_s <= stream.arrivals_s[0]
        assert stream.arrivals_s == sorted(stream.arrivals_s)


async def test_no_more_at_a_time_than_the_concurrency(url: str) -> None:
    streams = await drive(Load(url, {}, 3), [SAY] * 4, 1)
    for earlier, later in pairwise(streams):
        assert later.started_s >= earlier.arrivals_s[-1]


async def test_a_paced_reader_leaves_time_between_pieces(url: str) -> None:
    (stream,) = await drive(Load(url, {}, 5, pace=50.0), [SAY], 1)
    gaps = [late - early for early, late in zip(stream.arrivals_s, stream.arrivals_s[1:], strict=False)]
    assert min(gaps) >= 0.019


@pytest.mark.parametrize(
    ("wish", "says"), [("fail", "status 503"), ("short", "4 tokens instead of 5"), ("break", "0 tokens instead of 5")]
)
async def test_an_answer_that_is_not_whole_fails_the_run(url: str, wish: str, says: str) -> None:
    chats = [SAY, [{"role": "user", "content": wish}]]
    with pytest.raises(RequestFailed, match=says):
        await drive(Load(url, {}, 5), chats, 2)


async def test_nobody_listening_fails_the_run() -> None:
    with pytest.raises(RequestFailed, match="Connect"):
        await drive(Load(f"http://127.0.0.1:{free_port()}", {}, 5), [SAY], 1)
