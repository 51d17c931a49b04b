"""What a run under overload makes of what its clients saw."""

from __future__ import annotations

import json

import httpx

from loadtest.overload import MAX_TOKENS, Crowd, Outcome, summary


def answer(request: httpx.Request) -> httpx.Response:
    """Every second chat is refused; the others get two tokens and an end."""
    answer.asked += 1  # type: ignore[attr-defined]
    if answer.asked % 2 == 0:  # type: ignore[attr-defined]
        return httpx.Response(503, headers={"retry-after": "7"}, json={"error": {}})
    assert json.loads(request.content)["max_tokens"] == MAX_TOKENS
    pieces = [({"content": "a"}, None), ({"content": "b"}, None), ({}, "length")]
    chunks = [{"choices": [{"delta": delta, "finish_reason": reason}]} for delta, reason in pieces]
    return httpx.Response(200, text="".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n")


async def test_chats_are_counted_as_they_ended() -> None:
    answer.asked = 0  # type: ignore[attr-defined]
    crowd = Crowd("http://service", seed=1, transport=httpx.MockTransport(answer))
    outcomes = await crowd.at_once(10)
    await crowd.aclose()
    told = summary(outcomes, seconds=5.0)
    assert (told["asked"], told["finished"], told["refused"], told["lost"]) == (10, 5, 5, 0)
    assert told["goodput_tokens_per_s"] == 2.0
    assert told["retry_after_s"] == {"p50": 7.0, "p99": 7.0}


def test_a_stream_that_breaks_is_lost_and_a_refusal_after_a_wait_is_no_quick_one() -> None:
    told = summary([Outcome(200, 0.5, 2.0, 3, finished=False), Outcome(503, None, 9.0)], seconds=10.0)
    assert (told["lost"], told["refused"], told["refused_after_a_wait"]) == (1, 1, 1)
    assert told["refusal_s"] == {}
    assert told["last_first_token_s"] == 0.5
