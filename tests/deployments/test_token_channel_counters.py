"""Counters go a stream's own way, which has room for them, also where a channel is open."""

from __future__ import annotations

from contextlib import aclosing

from tiny_models import FINGERPRINT

from serve_app.deployments.inbox import Inbox
from serve_app.deployments.token_channels import TokenChannels
from serve_app.messages import GenerationRequest, GenerationStats, SamplingParams, TokenBatch


async def test_counters_are_not_lost_in_a_channel() -> None:
    channels, inbox = TokenChannels(), Inbox(0)
    request = GenerationRequest("r", FINGERPRINT, (1,), SamplingParams(seed=0), max_new_tokens=9, caller="me")
    first = TokenBatch(0, (5,), stats=GenerationStats(cached_prompt_tokens=3))
    async with aclosing(channels.read("me")) as reading:
        assert await anext(reading) == ()
        assert not channels.put(request, first)
        assert channels.put(request, TokenBatch(1, (6,)))
        ((_, at, ids, _),) = await anext(reading)
    inbox.put(TokenBatch(at, ids))  # it overtakes the first
    inbox.put(first)
    assert [await inbox.take(0), await inbox.take(0)] == [first, TokenBatch(1, (6,))]
