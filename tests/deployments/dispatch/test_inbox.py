"""What comes for an attempt by two ways is taken in the order of its tokens."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.core import Failure, FailureCode, FinishReason, Reply, TokenBatch
from serve_app.deployments.dispatch.inbox import Inbox

SOON_S = 0.01
LOST = Failure(FailureCode.REPLICA_LOST, "gone")


async def drained(inbox: Inbox) -> list[Reply]:
    replies: list[Reply] = []
    while (reply := await inbox.take(SOON_S)) is not None:
        replies.append(reply)
    return replies


@given(lengths=st.lists(st.integers(1, 3), max_size=8), first=st.integers(0, 5), seed=st.integers(0, 1000))
def test_any_order_of_arrival_is_taken_in_order(lengths: list[int], first: int, seed: int) -> None:
    batches: list[TokenBatch] = []
    at = first
    for length in lengths:
        batches.append(TokenBatch(at, tuple(range(at, at + length))))
        at += length
    batches.append(TokenBatch(at, finish_reason=FinishReason.STOP))
    arriving = random.Random(seed).sample(batches, len(batches))

    async def put_and_take() -> list[Reply | None]:
        inbox = Inbox(first)
        for batch in arriving:
            inbox.put(batch)
        assert not inbox.torn
        return [await inbox.take(1) for _ in batches]

    assert asyncio.run(put_and_take()) == batches


async def test_what_overtook_is_held_and_its_end_waits_for_it() -> None:
    inbox = Inbox(0)
    last = TokenBatch(2, (7,), finish_reason=FinishReason.LENGTH)
    inbox.put(last)
    inbox.close()
    assert inbox.torn
    assert await inbox.take(SOON_S) is None
    inbox.put(TokenBatch(0, (5, 6)))
    assert await drained(inbox) == [TokenBatch(0, (5, 6)), last]


async def test_a_sign_of_life_passes_and_one_that_overtook_says_nothing() -> None:
    inbox = Inbox(0)
    inbox.put(TokenBatch(3))
    assert not inbox.torn
    inbox.put(TokenBatch(0))
    assert await drained(inbox) == [TokenBatch(0)]


async def test_a_failure_waits_for_nothing() -> None:
    inbox = Inbox(0)
    inbox.put(TokenBatch(4, (1,)))
    inbox.put(LOST)
    assert await inbox.take(SOON_S) is LOST


@pytest.mark.parametrize("end", [Inbox.close, lambda inbox: inbox.lose("a"), lambda inbox: inbox.put(LOST)])
async def test_whoever_waits_is_woken(end: object) -> None:
    inbox = Inbox(0)
    waiting = asyncio.create_task(inbox.take(60))
    await asyncio.sleep(0)
    end(inbox)  # type: ignore[operator]
    async with asyncio.timeout(30):
        assert await waiting in (None, LOST)


async def test_after_the_end_nobody_waits_and_what_is_there_is_taken() -> None:
    inbox = Inbox(0)
    inbox.put(TokenBatch(0, (1,)))
    inbox.lose("a")
    async with asyncio.timeout(30):
        assert await inbox.take(60) == TokenBatch(0, (1,))
        assert await inbox.take(60) is None
