"""What a run under overload makes of what its clients saw."""

from __future__ import annotations

import asyncio
import time

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from loadtest.overload import MAX_TOKENS, Crowd, Outcome, summary
from loadtest.stalls import Stalls

CHUNKS = [
    'data: {"choices": [{"delta": {"content": "a"}, "finish_reason": null}]}',
    'data: {"choices": [{"delta": {"content": "b"}, "finish_reason": null}]}',
    'data: {"choices": [{"delta": {}, "finish_reason": "length"}]}',
    "data: [DONE]",
]


async def test_chats_are_counted_as_they_ended() -> None:
    asked = 0

    async def answer(request: web.Request) -> web.Response:
        """Every second chat is refused; the others get two tokens and an end."""
        nonlocal asked
        asked += 1
        assert (await request.json())["max_tokens"] == MAX_TOKENS
        assert request.headers["Authorization"] == "Bearer key"
        if asked % 2 == 0:
            return web.Response(status=503, headers={"retry-after": "7"})
        return web.Response(text="\n\n".join([*CHUNKS, ""]))

    app = web.Application()
    app.router.add_post("/v1/chat/completions", answer)
    async with TestServer(app) as server:
        crowd = Crowd(f"http://127.0.0.1:{server.port}", seed=1, headers={"Authorization": "Bearer key"})
        outcomes = await crowd.at_once(10)
        await crowd.aclose()
    told = summary(outcomes, seconds=5.0)
    assert (told["asked"], told["finished"], told["refused"], told["lost"]) == (10, 5, 5, 0)
    assert told["goodput_tokens_per_s"] == 2.0
    assert told["retry_after_s"] == {"p50": 7.0, "p99": 7.0}


def test_a_stream_that_breaks_is_lost_and_a_refusal_after_a_wait_is_no_quick_one() -> None:
    cut = Outcome(200, first_s=0.5, ended_s=2.0, tokens=3)
    told = summary([cut, Outcome(503, ended_s=9.0)], seconds=10.0)
    assert (told["lost"], told["refused"], told["refused_after_a_wait"]) == (1, 1, 1)
    assert told["refusal_s"] == {}
    assert told["last_first_token_s"] == 0.5


def test_what_the_clients_themselves_slept_is_told_apart() -> None:
    stalls = Stalls()
    for due, now in ((10.0, 10.015), (11.0, 11.5), (12.25, 13.0)):
        stalls.woke(due, now)
    slow = [Outcome(503, began=10.9, ended_s=0.7), Outcome(200, began=11.25, first_s=1.25, ended_s=2.0, finished=True)]
    told = summary(slow, 10.0, stalls)
    assert told["refusal_s"]["p50"] == 0.7
    assert told["refusal_less_stalls_s"]["p50"] == pytest.approx(0.2)
    assert told["first_token_less_stalls_s"]["p50"] == pytest.approx(1.25 - 0.25 - 0.25)


async def test_a_loop_that_is_held_up_stands_still() -> None:
    async with Stalls() as stalls:
        await asyncio.sleep(0)  # the watch begins
        time.sleep(0.1)  # noqa: ASYNC251 - holds the loop up
        await asyncio.sleep(0.02)
    assert sum(until - start for start, until in stalls.seen) >= 0.05
