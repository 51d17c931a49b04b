"""Anthropic's own client, unchanged, against the application on a real port."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import anthropic
import pytest
from fake_replica import ALIVE, FakeReplica, Script, card, says, tokens
from starlette.applications import Starlette

from serve_app.chat.tokenizer import ChatTokenizer
from serve_app.core import Failure, FailureCode

ANSWER = "The quick brown fox says 🙂 and naïve."
HI: dict[str, Any] = {"model": "tiny", "max_tokens": 100, "messages": [{"role": "user", "content": "Hi"}]}
Connect = Callable[..., Any]


@pytest.fixture
def connect(make_app: Callable[..., Starlette], serve: Callable[[Starlette], Any]) -> Connect:
    """connect(replica, **options of the app) -> the client."""

    async def make(replica: FakeReplica, **options: Any) -> anthropic.AsyncAnthropic:
        url = await serve(make_app(replica, **options))
        return anthropic.AsyncAnthropic(api_key="none", base_url=url, max_retries=0)

    return make


@pytest.fixture
async def official(connect: Connect, replica: FakeReplica) -> anthropic.AsyncAnthropic:
    client: anthropic.AsyncAnthropic = await connect(replica)
    return client


async def test_a_whole_message(official: anthropic.AsyncAnthropic) -> None:
    message = await official.messages.create(**HI)
    assert [block.type for block in message.content] == ["text"]
    assert message.content[0].text == ANSWER
    assert (message.stop_reason, message.usage.cache_read_input_tokens) == ("end_turn", 2)
    assert message._request_id


async def test_the_blocking_client(connect: Connect, replica: FakeReplica) -> None:
    asynchronous = await connect(replica)
    with anthropic.Anthropic(api_key="none", base_url=str(asynchronous.base_url), max_retries=0) as client:
        message = await asyncio.to_thread(client.messages.create, **HI)
    assert message.content[0].text == ANSWER


async def test_a_stream_through_heartbeats(
    connect: Connect, replica: FakeReplica, writes: Callable[..., Script]
) -> None:
    replica.scripts = [lambda request: [ALIVE, 0.1, *writes(pause_s=0.02)(request)]]
    client = await connect(replica, stream={"heartbeat_s": 0.01})
    for headers in ({}, {"x-stream-resume": "1"}):
        async with client.messages.stream(**HI, extra_headers=headers) as stream:
            assert "".join([text async for text in stream.text_stream]) == ANSWER
            message = await stream.get_final_message()
        assert message.stop_reason == "end_turn"
        assert message.usage.input_tokens + 2 == len(replica.requests[-1].prompt_token_ids)


async def test_raw_events(official: anthropic.AsyncAnthropic) -> None:
    stream = await official.messages.create(**HI, stream=True)
    types = [event.type async for event in stream]
    assert types[0] == "message_start"
    assert types[-2:] == ["message_delta", "message_stop"]


async def test_a_stop_sequence(official: anthropic.AsyncAnthropic) -> None:
    message = await official.messages.create(**HI, stop_sequences=[" fox"])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", " fox")


async def test_thinking_and_an_answer_sent_back(
    connect: Connect, thinker: ChatTokenizer, writes: Callable[..., Script]
) -> None:
    replica = FakeReplica([writes("<think>\nHm.\n</think>\n\nHello!")], state=card(vocab_size=thinker.vocab_size))
    client = await connect(replica, text=thinker)
    thinks: Any = {"type": "enabled", "budget_tokens": 1024}
    async with client.messages.stream(**HI, thinking=thinks) as stream:
        kinds = [event.type async for event in stream]
        message = await stream.get_final_message()
    assert {"thinking", "signature", "text"} <= set(kinds)
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert message.content[0].thinking == "Hm."
    assert message.usage.output_tokens_details.thinking_tokens > 0
    whole = await client.messages.create(**HI, thinking=thinks)
    assert [whole.content[0], whole.content[1].text] == [message.content[0], message.content[1].text]
    turns = [*HI["messages"], message.to_param(), {"role": "user", "content": "And?"}]
    assert (await client.messages.create(**{**HI, "messages": turns})).stop_reason == "end_turn"


@pytest.mark.usefixtures("calling")
async def test_calls(connect: Connect, thinker: ChatTokenizer, writes: Callable[..., Script]) -> None:
    answer = 'Let me see. [weather({"city": "Rome"})][time({})]'
    replica = FakeReplica([writes(answer)], state=card(vocab_size=thinker.vocab_size))
    client = await connect(replica, text=thinker)
    async with client.messages.stream(**HI) as stream:
        async for event in stream:
            if event.type == "input_json":
                assert isinstance(event.snapshot, dict)
        message = await stream.get_final_message()
    whole = await client.messages.create(**HI)
    for answered in (message, whole):
        assert answered.stop_reason == "tool_use"
        text, weather, time = answered.content
        assert (text.text, weather.name, weather.input) == ("Let me see. ", "weather", {"city": "Rome"})
        assert (time.name, time.input) == ("time", {})
        assert weather.id != time.id


async def test_tokens_are_counted(official: anthropic.AsyncAnthropic) -> None:
    counted = await official.messages.count_tokens(model="tiny", messages=HI["messages"], system="Be kind.")
    message = await official.messages.create(**HI, system="Be kind.")
    assert counted.input_tokens == message.usage.input_tokens + 2


async def test_models(official: anthropic.AsyncAnthropic) -> None:
    models = [model async for model in await official.models.list()]
    assert [(model.id, model.type, model.max_input_tokens) for model in models] == [("tiny", "model", 256)]
    assert (await official.models.retrieve("tiny")).created_at == models[0].created_at
    assert (await official.models.list(after_id="tiny")).data == []


async def test_the_beta_client(official: anthropic.AsyncAnthropic) -> None:
    edits: Any = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
    message = await official.beta.messages.create(
        **HI, betas=["context-management-2025-06-27"], context_management=edits
    )
    assert message.content[0].text == ANSWER


async def test_errors_are_of_the_clients_classes(official: anthropic.AsyncAnthropic, replica: FakeReplica) -> None:
    with pytest.raises(anthropic.BadRequestError, match="temperature") as raised:
        await official.messages.create(**HI, extra_body={"temperature": 7})
    assert raised.value.type == "invalid_request_error"
    assert raised.value.error_code == "invalid_value"
    assert raised.value.request_id
    with pytest.raises(anthropic.NotFoundError):
        await official.messages.create(**{**HI, "model": "claude"})
    replica.scripts = [says(Failure(FailureCode.OVERLOADED, "Full.", retry_after_s=1))]
    with pytest.raises(anthropic.ServiceUnavailableError) as full:
        await official.messages.create(**HI)
    assert full.value.type == "overloaded_error"


async def test_an_error_in_the_middle_of_a_stream(official: anthropic.AsyncAnthropic, replica: FakeReplica) -> None:
    replica.scripts = [says(tokens(0, 84), 0.02, Failure(FailureCode.ENGINE_FAILED, "It broke."))]
    stream = await official.messages.create(**HI, stream=True)
    with pytest.raises(anthropic.APIStatusError, match=r"It broke\."):
        async for _ in stream:
            pass


async def test_a_refusal_that_passes_is_retried(
    connect: Connect, replica: FakeReplica, writes: Callable[..., Script]
) -> None:
    replica.scripts = [says(Failure(FailureCode.OVERLOADED, "Full.", retry_after_s=0.01)), writes()]
    client = (await connect(replica)).with_options(max_retries=1)
    assert (await client.messages.create(**HI)).stop_reason == "end_turn"
    assert len(replica.requests) == 2
