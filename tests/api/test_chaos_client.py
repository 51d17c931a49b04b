"""The client of a chaos run against the real application: in each protocol it must find the same answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from fake_replica import FakeReplica, card
from grpc_server import grpc_server
from starlette.applications import Starlette

from loadtest.chaos import unlike_asked
from loadtest.chaos_client import ChaosClient
from loadtest.outcome import Outcome
from loadtest.verdicts import Answer
from loadtest.workload import Kind, Mode, Question, Visit, Wire, questions
from serve_app.api.grpc.servicer import Servicer
from serve_app.chat.tokenizer import ChatTokenizer

Writes = Callable[..., Any]
ARGUMENTS = '{"summary": "Tides.", "scores": [1, 2, 3], "source": null}'
CALL = f'<tool_call>{{"name": "look_up", "arguments": {ARGUMENTS}}}</tool_call>'
ROOM = {"context_tokens": 16_384, "kv_capacity_tokens": 65_536}
"""For the tools' schemas, in tokens of a small vocabulary."""
TEXT = "The quick brown fox says 🙂 and naïve."
"""What the replica of these tests answers, as ANSWER in the room's fixtures."""


def question(kind: Kind, wire: Wire, *, tools: bool = False) -> Question:
    """One that the workload makes, without what the scripted replica has no answer for."""
    for one in questions(1, 200):
        if one.kind is kind and one.wire is wire and ("tools" in one.body) is tools:
            left_out = ("n", "logprobs", "top_logprobs", "include", "min_tokens", "stop", "stop_sequences")
            limit = "max_output_tokens" if wire is Wire.RESPONSES else "max_tokens"
            body = {name: value for name, value in one.body.items() if name not in left_out} | {limit: 384}
            return Question(wire, body, kind)
    raise LookupError(kind)


JSON = question(Kind.STRUCTURED, Wire.CHAT)
TEXTS = [
    question(Kind.PLAIN, Wire.NATIVE),
    question(Kind.PLAIN, Wire.CHAT),
    question(Kind.RESPONSES, Wire.RESPONSES),
    question(Kind.ANTHROPIC, Wire.MESSAGES),
]
CALLS = [
    question(Kind.TOOLS, Wire.CHAT, tools=True),
    question(Kind.RESPONSES, Wire.RESPONSES, tools=True),
    question(Kind.ANTHROPIC, Wire.MESSAGES, tools=True),
]


def named(one: Question) -> str:
    return one.wire.name


@pytest.fixture
def ask(
    make_app: Callable[..., Starlette],
    http: Callable[[Starlette], httpx.AsyncClient],
    writes: Writes,
    tokenizer: ChatTokenizer,
) -> Callable[..., Awaitable[Outcome]]:
    async def asked(one: Question, text: str, mode: Mode = Mode.PLAIN, drops: tuple[int, ...] = ()) -> Outcome:
        replica = FakeReplica([writes(text)], state=card(vocab_size=tokenizer.vocab_size, **ROOM))
        client = http(make_app(replica))
        return await ChaosClient(client, "http://test", one, Visit(0, 0.0, 0, mode, drops)).play()

    return asked


def sound(outcome: Outcome) -> Answer:
    assert outcome.failure is None
    assert not outcome.faults
    assert not outcome.broken
    assert outcome.answer is not None
    return outcome.answer


@pytest.mark.parametrize("one", TEXTS, ids=named)
async def test_a_text_is_the_same_streamed_resumed_and_whole(one: Question, ask: Callable[..., Any]) -> None:
    streamed = sound(await ask(one, TEXT))
    assert streamed.texts == (TEXT,)
    resumed = await ask(one, TEXT, Mode.RESUME, (3, 5))
    assert sound(resumed) == streamed
    assert resumed.resumed == len(resumed.cut_s) == 2
    assert resumed.stream_id
    if one.may_be_whole:
        assert sound(await ask(one, TEXT, Mode.WHOLE)) == streamed


@pytest.mark.parametrize("one", CALLS, ids=named)
async def test_so_are_calls(one: Question, ask: Callable[..., Any]) -> None:
    streamed = sound(await ask(one, CALL))
    assert streamed.calls == ((("look_up", ARGUMENTS),),)
    assert not unlike_asked(one, streamed)
    assert sound(await ask(one, CALL, Mode.RESUME, (4,))) == streamed
    if one.may_be_whole:
        assert sound(await ask(one, CALL, Mode.WHOLE)) == streamed


async def test_logprobs_of_a_response_are_the_same_in_events_and_document(ask: Callable[..., Any]) -> None:
    plain = question(Kind.RESPONSES, Wire.RESPONSES)
    one = Question(
        plain.wire, {**plain.body, "include": ["message.output_text.logprobs"], "top_logprobs": 2}, plain.kind
    )
    streamed = sound(await ask(one, TEXT))
    assert streamed.logprobs
    assert len(streamed.logprobs[0]) >= 5
    assert len(streamed.logprobs[0][0][2]) == 2
    assert sound(await ask(one, TEXT, Mode.WHOLE)) == streamed


async def test_a_structured_answer_is_json(ask: Callable[..., Any]) -> None:
    streamed = sound(await ask(JSON, ARGUMENTS))
    assert streamed.texts == (ARGUMENTS,)
    assert not unlike_asked(JSON, streamed)
    assert sound(await ask(JSON, ARGUMENTS, Mode.WHOLE)) == streamed
    assert "is no JSON" in unlike_asked(JSON, sound(await ask(JSON, TEXT)))


async def test_an_answer_that_calls_nothing_is_not_as_asked(ask: Callable[..., Any]) -> None:
    assert unlike_asked(CALLS[0], sound(await ask(CALLS[0], TEXT))) == "calls no tool"


@pytest.mark.parametrize("mode", [Mode.PLAIN, Mode.RESUME])
async def test_grpc_has_the_answer_of_stream(
    mode: Mode,
    ask: Callable[..., Any],
    make_app: Callable[..., Starlette],
    writes: Writes,
    tokenizer: ChatTokenizer,
) -> None:
    replica = FakeReplica([writes(TEXT)], state=card(vocab_size=tokenizer.vocab_size, **ROOM))
    plain = question(Kind.PLAIN, Wire.NATIVE)
    one = Question(Wire.GRPC, plain.body, Kind.GRPC)
    wanted = sound(await ask(plain, TEXT))
    drops = (3, 5) if mode is Mode.RESUME else ()
    async with grpc_server(Servicer(make_app(replica), replica.model)) as target, httpx.AsyncClient() as client:
        seen = await ChaosClient(client, "", one, Visit(0, 0.0, 0, mode, drops), target).play()
        refused = Question(Wire.GRPC, {**plain.body, "top_p": 7.0}, Kind.GRPC)
        told = await ChaosClient(client, "", refused, Visit(0, 0.0, 0, mode), target).play()
    assert sound(seen) == wanted
    assert len(seen.cut_s) == seen.resumed == len(drops)
    assert told.answer is None
    assert "top_p" in (told.failure or "")
