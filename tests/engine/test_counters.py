"""What a request found in the cache is told with its first tokens: a stop string may end it before the last."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from tiny_models import collect, prompts_of, request_for

from serve_app.core import FinishReason, GenerationStats, TokenBatch
from serve_app.engine.engine import Engine
from serve_app.engine.replies import ReplyStream


@pytest.mark.parametrize("delivered", [(), (4, 5, 6)])
async def test_the_first_tokens_of_an_attempt_carry_the_counters(
    make_engine: Callable[..., Engine], delivered: tuple[int, ...]
) -> None:
    engine = make_engine()
    (prompt,) = prompts_of([40])
    await collect(engine, request_for(prompt, 2))
    replies = await collect(engine, request_for(prompt, 20, output_token_ids=delivered))
    batches = [reply for reply in replies if isinstance(reply, TokenBatch) and reply.token_ids]
    assert batches[0].first_index == len(delivered)
    assert batches[0].stats is not None
    assert batches[0].stats.cached_prompt_tokens == 32
    assert all(batch.stats is None for batch in batches[1:-1])
    assert batches[-1].stats is not None


async def test_batches_that_a_slow_caller_finds_joined_keep_them() -> None:
    stream = ReplyStream(asyncio.get_running_loop())
    first, last = GenerationStats(cached_prompt_tokens=3), GenerationStats(cached_prompt_tokens=3, decode_s=1.0)
    for batch in (TokenBatch(0, (1,), stats=first), TokenBatch(1, (2,))):
        stream.put(batch)
    assert await stream.take(1) == TokenBatch(0, (1, 2), stats=first)
    for batch in (TokenBatch(2, (3,), stats=first), TokenBatch(3, (4,), None, FinishReason.STOP, last)):
        stream.put(batch)
    assert await stream.take(1) == TokenBatch(2, (3, 4), None, FinishReason.STOP, last)
