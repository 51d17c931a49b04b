"""What comes for an attempt is taken in order, and whoever waits is woken when nothing can come any more."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from serve_app.core import Failure, FailureCode, Reply, TokenBatch
from serve_app.deployments.dispatch.inbox import Inbox

SOON_S = 0.01
LOST = Failure(FailureCode.REPLICA_LOST, "gone")


async def drained(inbox: Inbox) -> list[Reply]:
    replies: list[Reply] = []
    while (reply := await inbox.take(SOON_S)) is not None:
        replies.append(reply)
    return replies


async def test_what_comes_is_taken_in_order() -> None:
    inbox = Inbox()
    batches = [TokenBatch(0), TokenBatch(0, (5, 6)), TokenBatch(2, (7,))]
    for batch in batches:
        inbox.put(batch)
    assert await drained(inbox) == batches


@pytest.mark.parametrize(
    "end",
    [Inbox.fail, lambda inbox: inbox.lose("a"), lambda inbox: inbox.put(LOST), lambda inbox: inbox.put_by_call(LOST)],
)
async def test_whoever_waits_is_woken(end: Callable[[Inbox], None]) -> None:
    inbox = Inbox()
    waiting = asyncio.create_task(inbox.take(60))
    await asyncio.sleep(0)
    end(inbox)
    async with asyncio.timeout(30):
        assert await waiting in (None, LOST)


@pytest.mark.parametrize("end", [Inbox.fail, lambda inbox: inbox.lose("a")])
async def test_after_the_end_nobody_waits_and_what_is_there_is_taken(end: Callable[[Inbox], None]) -> None:
    inbox = Inbox()
    inbox.put(TokenBatch(0, (1,)))
    end(inbox)
    async with asyncio.timeout(30):
        assert await inbox.take(60) == TokenBatch(0, (1,))
        assert await inbox.take(60) is None


async def test_what_comes_by_serves_call_is_not_lost_with_a_channel() -> None:
    inbox = Inbox()
    inbox.put_by_call(TokenBatch(0, (1,)))
    inbox.lose("a")
    assert not inbox.broken
    assert await inbox.take(SOON_S) == TokenBatch(0, (1,))
    assert await inbox.take(SOON_S) is None
