"""The Responses API as OpenAI's own client uses it, over a real connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import openai
import pytest
from fake_replica import FakeReplica, Script
from starlette.applications import Starlette

ANSWER = "The quick brown fox says 🙂 and naïve."
MakeApp = Callable[..., Starlette]
Serve = Callable[[Starlette], Awaitable[str]]
Writes = Callable[..., Script]


@pytest.fixture
async def client(
    replica: FakeReplica, make_app: MakeApp, serve: Serve, writes: Writes
) -> AsyncIterator[openai.AsyncOpenAI]:
    replica.scripts = [writes(pause_s=0.001)]
    url = await serve(make_app(replica))
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as client:
        yield client


async def test_create_retrieve_and_delete(client: openai.AsyncOpenAI) -> None:
    response = await client.responses.create(model="tiny", input="Hi", instructions="Be brief.")
    assert response.output_text == ANSWER
    again = await client.responses.retrieve(response.id)
    assert again == response
    items = [item async for item in client.responses.input_items.list(response.id)]
    assert [item.type for item in items] == ["message"]
    await client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(response.id)


async def test_a_conversation_by_ids(client: openai.AsyncOpenAI) -> None:
    first = await client.responses.create(model="tiny", input="One")
    second = await client.responses.create(model="tiny", input="Two", previous_response_id=first.id)
    assert second.previous_response_id == first.id
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.input_tokens > first.usage.input_tokens + first.usage.output_tokens
    with pytest.raises(openai.BadRequestError, match="not found"):
        await client.responses.create(model="tiny", input="Three", previous_response_id="resp_nothing")


async def test_stream_to_the_final_response(client: openai.AsyncOpenAI) -> None:
    async with client.responses.stream(model="tiny", input="Hi") as stream:
        text = "".join([event.delta async for event in stream if event.type == "response.output_text.delta"])
        final = await stream.get_final_response()
    assert text == final.output_text == ANSWER
    assert (await client.responses.retrieve(final.id)).output_text == ANSWER


async def test_the_rest_of_a_stream_by_its_number(client: openai.AsyncOpenAI) -> None:
    stream = await client.responses.create(model="tiny", input="Hi", stream=True, background=True)
    text, after, response_id = "", -1, ""
    async for event in stream:
        after = event.sequence_number
        if event.type == "response.created":
            response_id = event.response.id
        if event.type == "response.output_text.delta":
            text += event.delta
            if len(text) > 5:
                break
    await stream.close()
    rest = await client.responses.retrieve(response_id, stream=True, starting_after=after)
    async for event in rest:
        assert event.sequence_number == after + 1
        after = event.sequence_number
        if event.type == "response.output_text.delta":
            text += event.delta
    assert text == ANSWER


async def test_poll_a_background_response(client: openai.AsyncOpenAI) -> None:
    response = await client.responses.create(model="tiny", input="Hi", background=True)
    async with asyncio.timeout(10):
        while response.status in ("queued", "in_progress"):
            response = await client.responses.retrieve(response.id)
    assert (response.status, response.output_text) == ("completed", ANSWER)


async def test_cancel_a_background_response(client: openai.AsyncOpenAI, replica: FakeReplica) -> None:
    replica.scripts = [lambda request: [None]]
    response = await client.responses.create(model="tiny", input="Hi", background=True)
    assert (await client.responses.cancel(response.id)).status == "cancelled"
    assert (await client.responses.retrieve(response.id)).status == "cancelled"


async def test_count_and_compact(client: openai.AsyncOpenAI) -> None:
    items = [{"role": "user", "content": "One"}, {"role": "assistant", "content": "Two"}]
    counted = await client.responses.input_tokens.count(model="tiny", input=items)  # type: ignore[arg-type]
    response = await client.responses.create(model="tiny", input=items)  # type: ignore[arg-type]
    assert response.usage is not None
    assert counted.input_tokens == response.usage.input_tokens
    compacted = await client.responses.compact(model="tiny", input=items)  # type: ignore[arg-type]
    assert [item.type for item in compacted.output] == ["message", "compaction"]
    assert compacted.usage.output_tokens > 0
    handed_back = [*[item.to_dict(warnings=False) for item in compacted.output], {"role": "user", "content": "Three"}]
    continued = await client.responses.create(model="tiny", input=handed_back)  # type: ignore[arg-type]
    assert continued.output_text == ANSWER
