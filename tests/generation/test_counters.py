"""What the engine counted reaches the caller once, with the first tokens, whatever happens to the stream."""

from __future__ import annotations

import asyncio

import pytest
from fake_replica import ALIVE, FakeReplica, Script, generation_request, says

from serve_app.core import FinishReason, GenerationStats, Reply, TokenBatch, decode_replies, encode_replies
from serve_app.generation.attempt_history import FailoverSettings
from serve_app.generation.attempts import Generation, interleave
from serve_app.generation.replica import ReplicaLost

pytestmark = pytest.mark.usefixtures("exact_time")  # else a stall would look like a silent replica

QUICK = FailoverSettings(first_backoff_s=0.001, max_backoff_s=0.002)


def counted(first: int, *ids: int, cached: int, finish: FinishReason | None = None) -> TokenBatch:
    return TokenBatch(first, ids, finish_reason=finish, stats=GenerationStats(cached_prompt_tokens=cached))


async def stats_of(*scripts: Script) -> list[tuple[int, int]]:
    """(first index of the batch, cached prompt tokens) wherever they are told."""
    changed = asyncio.Event()
    replies: list[Reply] = []
    async with Generation(FakeReplica(list(scripts)), generation_request(), changed, QUICK) as generation:
        async for _, reply in interleave({0: generation}, changed):
            replies.append(reply)
    assert isinstance(replies[-1], TokenBatch)
    assert replies[-1].finish_reason is FinishReason.LENGTH
    return [(r.first_index, r.stats.cached_prompt_tokens) for r in replies if isinstance(r, TokenBatch) and r.stats]


async def test_they_come_once_with_the_first_tokens() -> None:
    last = counted(2, 102, cached=3, finish=FinishReason.LENGTH)
    assert await stats_of(says(ALIVE, 0.001, counted(0, 100, cached=3), 0.001, TokenBatch(1, (101,)), last)) == [(0, 3)]


async def test_those_of_a_later_attempt_are_not_told() -> None:
    first = says(counted(0, 100, cached=3), 0.001, ReplicaLost("died"))
    second = says(counted(1, 101, cached=64), 0.001, counted(2, 102, cached=64, finish=FinishReason.LENGTH))
    assert await stats_of(first, second) == [(0, 3)]


async def test_an_attempt_that_delivered_nothing_has_counted_nothing() -> None:
    second = says(counted(0, 100, cached=5, finish=FinishReason.LENGTH))
    assert await stats_of(says(ALIVE, 0.001, ReplicaLost("died")), second) == [(0, 5)]


@pytest.mark.parametrize("cached", [0, 7])
def test_a_journal_keeps_them_where_they_came(cached: int) -> None:
    batch = counted(0, 100, cached=cached)
    assert decode_replies(encode_replies([(1, batch)])) == [(1, batch)]
    ((_, last),) = decode_replies(encode_replies([(0, TokenBatch(1, (101,), finish_reason=FinishReason.STOP))]))
    assert isinstance(last, TokenBatch)
    assert last.finish_reason is FinishReason.STOP
