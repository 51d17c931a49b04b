"""A channel to each replica that has several attempts; who loses something when it breaks is told."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

import pytest

from serve_app.deployments import channel_reader
from serve_app.deployments.channel_reader import ChannelReader
from serve_app.deployments.inbox import Inbox
from serve_app.deployments.token_channels import ChannelItem, ChannelRequest
from serve_app.messages import TokenBatch


class Call:
    """Serve's streaming call, as a test wants it to go."""

    def __init__(self, request: ChannelRequest) -> None:
        self.request = request
        self.messages: asyncio.Queue[tuple[ChannelItem, ...] | BaseException | None] = asyncio.Queue()
        self.cancelled = False
        self.given_up = asyncio.Event()

    def __aiter__(self) -> Call:
        return self

    async def __anext__(self) -> tuple[ChannelItem, ...]:
        message = await self.messages.get()
        if message is None:
            raise StopAsyncIteration
        if isinstance(message, BaseException):
            raise message
        return message

    def cancel(self) -> None:
        self.cancelled = True
        self.given_up.set()


class Replicas:
    """A reader, the calls it has made, and attempts that last as long as the test."""

    def __init__(self, stack: ExitStack, caller: str = "me") -> None:
        self._stack = stack
        self.calls: list[Call] = []
        self.reader = ChannelReader(self._open, caller)

    def _open(self, request: ChannelRequest) -> Call:
        self.calls.append(Call(request))
        return self.calls[-1]

    async def answer(self, replica: str, first_index: int = 0) -> tuple[int, Inbox]:
        number, inbox = self._stack.enter_context(self.reader.attempt(first_index))
        self.reader.answered(number, replica)
        await asyncio.sleep(0)
        return number, inbox

    async def say(self, message: tuple[ChannelItem, ...] | BaseException | None) -> None:
        """On the latest call; returns when the reader has done what it does with it."""
        self.calls[-1].messages.put_nowait(message)
        for _ in range(5):
            await asyncio.sleep(0)


@pytest.fixture
def replicas() -> Replicas:
    return Replicas(ExitStack())


async def test_two_attempts_at_a_replica_get_a_channel_and_one_does_not(replicas: Replicas) -> None:
    await replicas.answer("a")
    await replicas.answer("b")
    assert replicas.calls == []
    await replicas.answer("b")
    await replicas.answer("b")
    assert [call.request for call in replicas.calls] == [ChannelRequest("me", "b")]


async def test_a_caller_without_a_name_opens_none() -> None:
    replicas = Replicas(ExitStack(), caller="")
    await replicas.answer("a")
    await replicas.answer("a")
    assert replicas.calls == []


async def test_each_item_comes_to_its_attempt_and_one_that_is_over_is_no_trouble(replicas: Replicas) -> None:
    first, its = await replicas.answer("a", first_index=2)
    second, others = await replicas.answer("a")
    await replicas.say(())
    await replicas.say(((second, 0, (9,), None), (77, 0, (1,), None), (first, 2, (5, 6), None)))
    assert await its.take(0) == TokenBatch(2, (5, 6))
    assert await others.take(0) == TokenBatch(0, (9,))


@pytest.mark.parametrize(
    "end", [ConnectionResetError(), asyncio.CancelledError(), RuntimeError("a bug in the replica")]
)
async def test_when_it_breaks_its_attempts_are_lost_and_no_others(replicas: Replicas, end: BaseException) -> None:
    _, elsewhere = await replicas.answer("b")
    lost = [(await replicas.answer("a"))[1] for _ in range(2)]
    await replicas.say(())
    await replicas.say(end)
    assert [inbox.lost for inbox in (*lost, elsewhere)] == [True, True, False]
    assert replicas.calls[0].cancelled


async def test_its_end_loses_nothing_and_the_next_attempts_get_another(replicas: Replicas) -> None:
    inboxes = [(await replicas.answer("a"))[1] for _ in range(2)]
    await replicas.say(())
    await replicas.say(None)
    assert not any(inbox.lost for inbox in inboxes)
    assert not replicas.calls[0].cancelled
    await replicas.answer("a")
    assert len(replicas.calls) == 2


@pytest.mark.parametrize("refusal", [None, ConnectionResetError()])
async def test_one_that_could_not_be_opened_costs_nobody_and_is_not_tried_again_at_once(
    replicas: Replicas, monkeypatch: pytest.MonkeyPatch, refusal: BaseException | None
) -> None:
    inboxes = [(await replicas.answer("a"))[1] for _ in range(2)]
    await replicas.say(refusal)
    for _ in range(3):
        await replicas.answer("a")
    assert len(replicas.calls) == 1
    assert not any(inbox.lost for inbox in inboxes)
    monkeypatch.setattr(replicas.reader, "_not_before", {"a": 0.0})
    await replicas.answer("a")
    assert len(replicas.calls) == 2


async def test_one_that_can_not_even_be_asked_for_is_asked_for_again_later(
    replicas: Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(request: ChannelRequest) -> Call:
        raise RuntimeError("the router has shut down")

    monkeypatch.setattr(replicas.reader, "_open_channel", refuse)
    inboxes = [(await replicas.answer("a"))[1] for _ in range(2)]
    await asyncio.sleep(0)
    assert replicas.reader._reading == {}
    assert "a" in replicas.reader._not_before
    assert not any(inbox.lost for inbox in inboxes)


async def test_one_that_does_not_open_in_time_is_given_up(replicas: Replicas, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_reader, "OPEN_S", 0.01)
    inboxes = [(await replicas.answer("a"))[1] for _ in range(2)]
    async with asyncio.timeout(5):
        await replicas.calls[0].given_up.wait()
    assert not any(inbox.lost for inbox in inboxes)
