"""serve-app bench: what it asks, and what it makes of the answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from fake_api import Exchange, FakeApi

from serve_app.cli.bench_load import Level, Load, Outcome, Summary, percentile
from serve_app.cli.main import main

CHAT = "/v1/chat/completions"


def chunk(text: str = "", finish: str | None = None, **more: object) -> bytes:
    choice = {"index": 0, "delta": {"content": text} if text else {}, "finish_reason": finish}
    return b"data: " + json.dumps({"choices": [choice], **more}).encode() + b"\n\n"


def answering(exchange: Exchange) -> None:
    """Three pieces of seven tokens."""
    exchange.start_stream()
    for text in ("a", "bc", "d"):
        exchange.write(chunk(text))
    exchange.write(chunk(finish="length"))
    exchange.write(b'data: {"choices": [], "usage": {"completion_tokens": 7}}\n\ndata: [DONE]\n\n')
    exchange.end_stream()


def cut(exchange: Exchange) -> None:
    exchange.start_stream()
    exchange.write(chunk("a"))
    exchange.end_stream()


def failing(exchange: Exchange) -> None:
    exchange.start_stream()
    exchange.write(chunk("a"))
    exchange.write(b'data: {"error": {"message": "the replica was lost"}}\n\n')
    exchange.end_stream()


def streaming(events: bytes) -> Callable[[Exchange], None]:
    def route(exchange: Exchange) -> None:
        exchange.start_stream()
        exchange.write(events)
        exchange.end_stream()

    return route


def bench(api: FakeApi, tmp_path: Path, *arguments: str) -> tuple[int, list[dict[str, object]]]:
    path = tmp_path / "bench.json"
    status = main(["bench", api.url, "--seconds", "0.2", "--json", str(path), *arguments])
    return status, json.loads(path.read_text())


def test_both_loops_and_what_they_ask(api: FakeApi, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = []

    def noting(exchange: Exchange) -> None:
        asked.append(exchange.json)
        answering(exchange)

    api.routes[CHAT] = noting
    status, levels = bench(api, tmp_path, "--clients", "1", "3", "--rates", "40", "--max-tokens", "9", "--words", "5")
    assert status == 0
    assert [level["name"] for level in levels] == ["1 clients", "3 clients", "40 a second"]
    assert all(body["model"] == "fake-1" and body["max_tokens"] == 9 and body["stream"] for body in asked)
    assert len({body["messages"][0]["content"] for body in asked}) == len(asked), "no prompt is cached"
    assert all(outcome["tokens"] == 7 for level in levels for outcome in level["outcomes"])  # type: ignore[attr-defined]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[2:]] == [["1", "clients"], ["3", "clients"], ["40", "a"]]


@pytest.mark.parametrize(
    ("route", "said"),
    [
        (cut, "the stream ended before the answer did"),
        (failing, "the replica was lost"),
        (lambda exchange: exchange.refuse(503, "overloaded", "The service is full."), "503: The service is full."),
        (lambda exchange: exchange.answer(500, b"oh"), "500: oh"),
        (lambda exchange: exchange.drop(), "RemoteProtocolError"),
        (streaming(b"data: oh no\n\n"), "an event is no chunk of OpenAI's API: oh no"),
        (streaming(b"data: [1]\n\n"), "an event is no chunk"),
        (streaming(b'data: {"choices": ["x"]}\n\n'), "an event is no chunk"),
        (lambda exchange: exchange.answer(200, b"<html>"), "SSEError"),
    ],
)
def test_what_has_no_answer_is_counted_and_said(
    route: object, said: str, api: FakeApi, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    api.routes[CHAT] = route  # type: ignore[assignment]
    status, [level] = bench(api, tmp_path, "--clients", "2")
    assert status == 1
    outcomes = level["outcomes"]
    assert isinstance(outcomes, list)
    assert all(said in outcome["error"] for outcome in outcomes)
    assert f"{len(outcomes)} times: " in capsys.readouterr().out


def test_an_open_loop_counts_from_the_moment_that_was_planned() -> None:
    """The server answers one at a time: the wait of those behind it is theirs, too."""
    level = Level(
        "x", [Outcome(0.0, [0.5, 0.6], 0.6, 2), Outcome(0.1, [1.5], 1.5, 1), Outcome(0.2, [], 2.0, 0, "503")], 2.0
    )
    told = Summary.of(level)
    assert (told.asked, told.answered, told.tokens_per_s) == (3, 2, 1.5)
    assert told.first_s == (1.5, 1.5)
    assert told.between_s == (pytest.approx(0.1), pytest.approx(0.1))
    assert told.errors == {"503": 1}


async def test_a_chat_of_the_open_loop_is_due_before_the_client_gets_to_it() -> None:
    def slow(request: httpx.Request) -> httpx.Response:
        return httpx.Response(
            200, headers={"content-type": "text/event-stream"}, content=chunk("a") + chunk(finish="stop")
        )

    async with httpx.AsyncClient(transport=httpx.MockTransport(slow)) as http:
        load = Load(http, "http://test/v1/chat/completions", "m", words=3, max_tokens=4, seed=1)
        level = await load.open(200.0, 0.1)
    assert all(outcome.pieces_s[0] >= 0 and not outcome.error for outcome in level.outcomes)
    dues = [outcome.due_s for outcome in level.outcomes]
    assert dues == sorted(dues)
    assert 5 < len(dues) < 60


def test_nothing_came() -> None:
    told = Summary.of(Level("x", [], 0.0))
    assert (told.tokens_per_s, told.first_s) == (0.0, (None, None))
    assert percentile([3.0, 1.0, 2.0], 0.99) == 3.0


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["http://127.0.0.1:1"], 1, "no server answers at http://127.0.0.1:1/v1"),
        (["--rates", "0"], 2, "must be above 0"),
        (["--seconds", "-1"], 2, "must be above 0"),
        (["--json", "/nowhere/bench.json"], 2, "/nowhere/bench.json can't be written"),
    ],
)
def test_what_can_not_be_measured(
    arguments: list[str], status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == status
    assert said in capsys.readouterr().err


def test_a_server_that_asks_for_a_key(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    api.routes["/v1/models"] = lambda exchange: exchange.refuse(401, "invalid_api_key", "A key is needed.")
    assert main(["bench", api.url]) == 1
    assert "SERVE_APP_API_KEY" in capsys.readouterr().err
