"""One message for all tokens of a step, to the right caller, and none lost when a channel ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest
from tiny_models import FINGERPRINT

from serve_app.deployments import token_channels
from serve_app.deployments.token_channels import ChannelItem, TokenChannels
from serve_app.messages import Failure, FailureCode, FinishReason, GenerationRequest, Reply, SamplingParams, TokenBatch


def request(attempt: int, caller: str = "me") -> GenerationRequest:
    return GenerationRequest(
        "r", FINGERPRINT, (1,), SamplingParams(seed=0), max_new_tokens=9, caller=caller, attempt=attempt
    )


async def opened(channels: TokenChannels, caller: str = "me") -> AsyncGenerator[tuple[ChannelItem, ...], None]:
    reading = channels.read(caller)
    assert await anext(reading) == ()
    return reading


async def test_what_the_streams_of_a_step_put_in_one_after_the_other_is_one_message() -> None:
    channels = TokenChannels()
    reading = await opened(channels)
    woken = asyncio.Event()

    async def stream(attempt: int) -> None:
        with channels.stream("me"):
            await woken.wait()
            assert channels.put(request(attempt), TokenBatch(4, (attempt,)))

    async with asyncio.TaskGroup() as tasks:
        message = tasks.create_task(anext(reading))  # type: ignore[arg-type]
        for attempt in (1, 2, 3):
            tasks.create_task(stream(attempt))
        await asyncio.sleep(0)
        woken.set()
    assert sorted(message.result()) == [(1, 4, (1,), None), (2, 4, (2,), None), (3, 4, (3,), None)]
    await reading.aclose()


@pytest.mark.parametrize(
    "reply", [TokenBatch(3, (1,), finish_reason=FinishReason.STOP), Failure(FailureCode.OVERLOADED, "full")]
)
async def test_last_words_go_their_own_way(reply: Reply) -> None:
    channels = TokenChannels()
    async with aclosing(await opened(channels)):
        assert not channels.put(request(1), reply)


async def test_without_a_channel_of_its_caller_a_stream_goes_its_own_way() -> None:
    channels = TokenChannels()
    assert not channels.put(request(1), TokenBatch(0, (1,)))
    async with aclosing(await opened(channels, "another")):
        assert not channels.put(request(1), TokenBatch(0, (1,)))
    assert not channels.put(request(1, "another"), TokenBatch(0, (1,)))


async def test_a_channel_ends_when_it_has_no_streams_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_channels, "IDLE_S", 0.01)
    channels = TokenChannels()
    reading = await opened(channels)
    with channels.stream("me"):
        ending = asyncio.create_task(anext(reading, None))  # type: ignore[arg-type]
        await asyncio.wait({ending}, timeout=0.1)
        assert not ending.done()
        assert channels.put(request(1), TokenBatch(0, (1,)))
        assert await ending == ((1, 0, (1,), None),)
    assert await anext(reading, None) is None
    assert not channels.put(request(1), TokenBatch(1, (1,)))


async def test_a_later_channel_of_the_same_caller_takes_the_place_of_the_first() -> None:
    channels = TokenChannels()
    first = await opened(channels)
    second = await opened(channels)
    await first.aclose()
    assert channels.put(request(1), TokenBatch(0, (1,)))
    assert await anext(second) == ((1, 0, (1,), None),)
    await second.aclose()
