"""The client of a chaos run against scripted servers: it must notice what a lenient client would forgive."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from simulated_time import simulated_time

from loadtest import chaos_client
from loadtest.chaos_client import ChaosClient
from loadtest.outcome import Outcome
from loadtest.workload import Mode, Question, Visit, Wire

STREAM = "s" * 22
QUESTION = Question(Wire.NATIVE, {"max_tokens": 3, "seed": 1, "prompt": "x"})
DONE = {"finish_reason": "length", "usage": {"prompt_tokens": 1, "completion_tokens": 3}, "seed": 1}


def event(index: int | None, token: int) -> bytes:
    return numbered(index, "data: " + json.dumps({"token_id": token, "generated_text": f"<{token}>"}))


def done(index: int | None) -> bytes:
    return numbered(index, "event: done\ndata: " + json.dumps(DONE))


def numbered(index: int | None, text: str) -> bytes:
    start = "" if index is None else f"id: {STREAM}:{index}:0a1b2c3d\n"
    return f"{start}{text}\n\n".encode()


class Script(httpx.AsyncByteStream):
    """A body; an exception in it is raised where it stands, and a number is a pause in seconds."""

    def __init__(self, *parts: bytes | Exception | float) -> None:
        self._parts = parts

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for part in self._parts:
            if isinstance(part, Exception):
                raise part
            if isinstance(part, float):
                await asyncio.sleep(part)
            else:
                yield part


class Server:
    """Answers with one response after the other, and keeps the requests."""

    def __init__(self, *responses: httpx.Response | Exception) -> None:
        self._responses = list(responses)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        response = self._responses.pop(0)
        if isinstance(response, Exception):
            raise response
        return response


def body(*parts: bytes | Exception, **headers: str) -> httpx.Response:
    return httpx.Response(200, headers={"content-type": "text/event-stream", **headers}, stream=Script(*parts))


def resumable(*parts: bytes | Exception) -> httpx.Response:
    return body(*parts, **{"x-stream-id": STREAM})


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chaos_client, "_BACKOFF_S", 0.0)


@pytest.fixture
def play() -> Callable[..., Any]:
    async def played(server: Server, mode: Mode = Mode.PLAIN, drops: tuple[int, ...] = ()) -> Outcome:
        async with httpx.AsyncClient(transport=httpx.MockTransport(server)) as http:
            return await ChaosClient(http, "http://test", QUESTION, Visit(0, 0.0, 0, mode, drops)).play()

    return played


async def test_a_whole_stream(play: Callable[..., Any]) -> None:
    seen = await play(Server(body(event(None, 1), event(None, 2), event(None, 3), done(None))))
    assert seen.answer.token_ids == (1, 2, 3)
    assert seen.answer.texts == ("<1><2><3>",)
    assert not seen.broken
    assert not seen.faults


async def test_a_plain_client_repeats_and_keeps_nothing_of_the_broken_answer(play: Callable[..., Any]) -> None:
    whole = body(event(None, 1), event(None, 2), event(None, 3), done(None))
    seen = await play(Server(body(event(None, 1), httpx.ReadError("gone")), httpx.ConnectError("no"), whole))
    assert seen.answer.token_ids == (1, 2, 3)
    assert len(seen.broken) == 2
    assert len(seen.arrivals_s) == 4


async def test_a_body_that_ends_early_is_told_from_an_error(play: Callable[..., Any]) -> None:
    whole = body(event(None, 1), event(None, 2), event(None, 3), done(None))
    seen = await play(Server(body(event(None, 1)), whole))
    assert "as if it were whole" in seen.broken[0][1]


async def test_a_resuming_client_names_the_last_event_it_has(play: Callable[..., Any]) -> None:
    server = Server(
        resumable(event(1, 1), httpx.ReadError("gone")), resumable(event(2, 2)), resumable(event(3, 3), done(4))
    )
    seen = await play(server, Mode.RESUME)
    assert seen.answer.token_ids == (1, 2, 3)
    assert [request.headers.get("last-event-id") for request in server.requests] == [
        None,
        f"{STREAM}:1:0a1b2c3d",
        f"{STREAM}:2:0a1b2c3d",
    ]
    assert {request.url.path for request in server.requests[1:]} == {f"/v1/streams/{STREAM}"}
    assert seen.resumed == 2
    assert not seen.faults


async def test_an_answer_is_late_and_not_lost_while_it_comes(
    play: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chaos_client, "DEADLINE_S", 0.5)
    with simulated_time():
        slow = Script(event(None, 1), 0.4, event(None, 2), 0.4, event(None, 3), 0.4, done(None))
        seen = await play(Server(httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=slow)))
        assert (seen.answer.token_ids, seen.failure) == ((1, 2, 3), None)
        silent = Script(event(None, 1), 0.6, event(None, 2))
        seen = await play(Server(httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=silent)))
        assert "no answer in time; 1 events" in str(seen.failure)


async def test_it_drops_its_own_connection_when_told_to(play: Callable[..., Any]) -> None:
    server = Server(resumable(event(1, 1), event(2, 2)), resumable(event(3, 3), done(4)))
    seen = await play(server, Mode.RESUME, drops=(2,))
    assert len(seen.cut_s) == 1
    assert not seen.broken
    assert seen.answer.token_ids == (1, 2, 3)


@pytest.mark.parametrize(
    ("indexes", "repeated"), [((1, 2, 2, 3), True), ((1, 3, 4, 5), False), ((2, 3, 4, 5), False), ((3, 2, 3, 4), True)]
)
async def test_ids_that_do_not_go_up_by_one_are_noted(
    play: Callable[..., Any], indexes: tuple[int, ...], repeated: bool
) -> None:
    events = [event(index, 1) for index in indexes[:3]]
    seen = await play(Server(resumable(*events, done(indexes[3]))), Mode.RESUME)
    assert seen.faults
    assert seen.repeated_events is repeated


async def test_what_the_server_says_for_good_is_the_end(play: Callable[..., Any]) -> None:
    gone = httpx.Response(410, json={"error": {"message": "expired", "code": "stream_gone"}})
    seen = await play(Server(resumable(event(1, 1), httpx.ReadError("gone")), gone), Mode.RESUME)
    assert seen.answer is None
    assert "410" in seen.failure
    error = b'event: error\ndata: {"error": {"message": "lost", "code": "replica_lost"}}\n\n'
    seen = await play(Server(resumable(event(1, 1), error)), Mode.RESUME)
    assert seen.answer is None
    assert "replica_lost" in seen.failure
    assert not seen.repeated_events


async def test_a_refusal_is_waited_out_and_is_no_broken_connection(play: Callable[..., Any]) -> None:
    busy = httpx.Response(503, headers={"retry-after": "0"}, json={"error": {"message": "busy", "code": "overloaded"}})
    seen = await play(Server(busy, body(event(None, 1), event(None, 2), event(None, 3), done(None))))
    assert seen.refused == 1
    assert not seen.broken
    assert seen.answer is not None


async def test_resume_that_is_not_offered_is_a_failure(play: Callable[..., Any]) -> None:
    seen = await play(Server(body(event(None, 1))), Mode.RESUME)
    assert "x-stream-id" in seen.failure
