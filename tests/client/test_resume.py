"""Which errors a resumed stream survives, with both clients."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import pytest
from fake_api import Exchange, FakeApi

from serve_app.client import AsyncClient, BadRequest, Client, ServeAppError, StreamError
from serve_app.client import resume as client_resume

STREAM_ID = "A" * 22
REST = f"/v1/streams/{STREAM_ID}"


@pytest.fixture(autouse=True)
def quick_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_resume, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(client_resume, "LONGEST_PAUSE_S", 0.01)


@pytest.fixture(params=["sync", "async"])
def complete(request: pytest.FixtureRequest, api: FakeApi) -> Callable[[], str]:
    """The text of a resumable stream."""

    def synchronous() -> str:
        with Client(api.url) as client:
            return client.complete(prompt="p", resume=True).text

    async def asynchronous() -> str:
        async with AsyncClient(api.url) as client:
            return (await client.complete(prompt="p", resume=True)).text

    return synchronous if request.param == "sync" else lambda: asyncio.run(asynchronous())


def event_id(index: int) -> str:
    """Of which only the server knows what it means."""
    return f"{index}?;=x:"


def token(exchange: Exchange, index: int) -> None:
    data = json.dumps({"token_id": index, "generated_text": f"{index} "})
    exchange.write(f"id: {event_id(index)}\ndata: {data}\n\n".encode())


def begin(exchange: Exchange) -> None:
    """One token, and the connection is lost."""
    exchange.start_stream({"X-Stream-Id": STREAM_ID})
    token(exchange, 0)
    exchange.drop()


def finish(exchange: Exchange) -> None:
    exchange.start_stream({"X-Stream-Id": STREAM_ID})
    token(exchange, 1)
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    done = json.dumps({"finish_reason": "stop", "usage": usage, "seed": 7})
    exchange.write(f"id: {event_id(2)}\nevent: done\ndata: {done}\n\n".encode())
    exchange.end_stream()


def error_event(code: str) -> Callable[[Exchange], None]:
    def route(exchange: Exchange) -> None:
        exchange.start_stream({"X-Stream-Id": STREAM_ID})
        error = json.dumps({"error": {"message": "Trouble.", "code": code}})
        exchange.write(f"event: error\ndata: {error}\n\n".encode())
        exchange.end_stream()

    return route


def no_route(exchange: Exchange) -> None:
    """As Serve's proxy answers before it knows the application."""
    exchange.answer(404, b"Path '/v1/streams' not found.", {"Content-Type": "text/plain"})


def unavailable(exchange: Exchange) -> None:
    exchange.refuse(503, "journal_unavailable", "The journals can't be reached.", {"Retry-After": "0"})


def after(*troubles: Callable[[Exchange], None]) -> Callable[[Exchange], None]:
    left = list(troubles)
    return lambda exchange: (left.pop(0) if left else finish)(exchange)


@pytest.mark.parametrize(
    "trouble",
    [error_event("journal_unavailable"), error_event("slow_reader"), unavailable, no_route],
    ids=["journal in the stream", "slow reader", "journal", "no route yet"],
)
def test_what_may_pass_is_waited_for(
    api: FakeApi, complete: Callable[[], str], trouble: Callable[[Exchange], None]
) -> None:
    api.routes |= {"/stream": begin, REST: after(trouble, trouble)}
    assert complete() == "0 1 "
    assert [exchange.headers["last-event-id"] for exchange in api.asked(REST)] == [event_id(0)] * 3


def test_a_heartbeat_after_an_id_is_no_event(api: FakeApi, complete: Callable[[], str]) -> None:
    def begin_and_wait(exchange: Exchange) -> None:
        exchange.start_stream({"X-Stream-Id": STREAM_ID})
        token(exchange, 0)
        exchange.write(b": ping\n\n")
        exchange.drop()

    api.routes |= {"/stream": begin_and_wait, REST: finish}
    assert complete() == "0 1 "


def test_an_event_that_comes_twice_is_taken_once(api: FakeApi, complete: Callable[[], str]) -> None:
    def repeat(exchange: Exchange) -> None:
        exchange.start_stream({"X-Stream-Id": STREAM_ID})
        token(exchange, 0)
        exchange.drop()

    api.routes |= {"/stream": begin, REST: after(repeat)}
    assert complete() == "0 1 "


def test_who_has_no_event_yet_asks_for_all(api: FakeApi, complete: Callable[[], str]) -> None:
    def nothing(exchange: Exchange) -> None:
        exchange.start_stream({"X-Stream-Id": STREAM_ID})
        exchange.drop()

    def all_of_it(exchange: Exchange) -> None:
        exchange.start_stream({"X-Stream-Id": STREAM_ID})
        token(exchange, 0)
        exchange.drop()

    api.routes |= {"/stream": nothing, REST: after(all_of_it)}
    assert complete() == "0 1 "
    assert [exchange.headers.get("last-event-id") for exchange in api.asked(REST)] == [None, event_id(0)]


@pytest.mark.parametrize(
    ("trouble", "error"),
    [
        (error_event("engine_failed"), StreamError),
        (lambda exchange: exchange.refuse(404, "stream_not_found", "Not yours."), BadRequest),
        (lambda exchange: exchange.refuse(410, "stream_gone", "Send it again."), BadRequest),
        (lambda exchange: exchange.refuse(410, "stream_changed", "Send it again."), BadRequest),
        (error_event("stream_changed"), StreamError),
    ],
    ids=["failed", "foreign", "gone", "changed", "changed later"],
)
def test_what_ends_the_stream_is_raised_at_once(
    api: FakeApi, complete: Callable[[], str], trouble: Callable[[Exchange], None], error: type[ServeAppError]
) -> None:
    api.routes |= {"/stream": begin, REST: trouble}
    with pytest.raises(error):
        complete()
    assert len(api.asked(REST)) == 1


def test_a_place_without_serve_app_is_not_asked_for_ever(api: FakeApi, complete: Callable[[], str]) -> None:
    api.routes |= {"/stream": begin, REST: no_route}
    with pytest.raises(BadRequest):
        complete()
    assert len(api.asked(REST)) == client_resume.ATTEMPTS
