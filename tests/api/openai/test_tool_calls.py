"""Tool calls in OpenAI's schema: streamed, whole and resumed, as its own client reads them."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import openai
import pytest
from fake_replica import FakeReplica, Script, card
from starlette.applications import Starlette

from serve_app.chat.tokenizer import ChatTokenizer

Writes = Callable[..., Script]

URL = "/v1/chat/completions"
MESSAGES: list[Any] = [{"role": "user", "content": "Weather in Rome?"}]
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
    for name in ("get_weather", "get_time")
]
CALLS = "".join(
    f'<tool_call>\n{{"name": "{name}", "arguments": {{"city": "R\\u00f6me 🙂"}}}}\n</tool_call>\n'
    for name in ("get_weather", "get_time")
)
CITY = {"city": "Röme 🙂"}


@pytest.fixture
def calling(writes: Writes, tokenizer: ChatTokenizer) -> FakeReplica:
    state = card(vocab_size=tokenizer.vocab_size, context_tokens=2048)
    return FakeReplica([writes(f"I look.\n{CALLS}")], state=state)


@pytest.fixture
def api(
    calling: FakeReplica, make_app: Callable[..., Starlette], http: Callable[[Starlette], httpx.AsyncClient]
) -> httpx.AsyncClient:
    return http(make_app(calling))


def deltas_of(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: {")]
    return [json.loads(line)["choices"][0] for line in lines]


async def test_a_whole_answer_has_text_and_calls(api: httpx.AsyncClient) -> None:
    body = (await api.post(URL, json={"messages": MESSAGES, "tools": TOOLS})).json()
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "I look."
    first, second = choice["message"]["tool_calls"]
    assert (first["type"], first["function"]["name"], second["function"]["name"]) == (
        "function",
        "get_weather",
        "get_time",
    )
    assert json.loads(first["function"]["arguments"]) == json.loads(second["function"]["arguments"]) == CITY
    assert first["id"] != second["id"]


async def test_the_same_text_without_tools_is_text(api: httpx.AsyncClient) -> None:
    for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        body = (await api.post(URL, json={"messages": MESSAGES, **fields})).json()
        (choice,) = body["choices"]
        assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", f"I look.\n{CALLS}")
        assert "tool_calls" not in choice["message"]


@pytest.mark.parametrize("headers", [{}, {"x-stream-resume": "1"}])
async def test_a_stream_begins_a_call_once_and_then_adds_to_its_arguments(
    api: httpx.AsyncClient, headers: dict[str, str]
) -> None:
    body = {"messages": MESSAGES, "tools": TOOLS, "stream": True}
    choices = deltas_of((await api.post(URL, json=body, headers=headers)).text)
    assert choices[0]["delta"] == {"role": "assistant", "content": None, "refusal": None}
    assert choices[-1]["finish_reason"] == "tool_calls"
    pieces = [choice["delta"]["tool_calls"][0] for choice in choices if "tool_calls" in choice["delta"]]
    for index, name in enumerate(("get_weather", "get_time")):
        first, *rest = [piece for piece in pieces if piece["index"] == index]
        assert (first["type"], first["function"]) == ("function", {"name": name, "arguments": ""})
        assert len(rest) > 2
        assert all(piece.keys() == {"index", "function"} for piece in rest)
        assert json.loads("".join(piece["function"]["arguments"] for piece in rest)) == CITY


async def test_an_answer_of_one_call_ends_with_it(api: httpx.AsyncClient, calling: FakeReplica) -> None:
    body = (
        await api.post(URL, json={"messages": MESSAGES, "tools": TOOLS, "parallel_tool_calls": False, "seed": 1})
    ).json()
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["get_weather"]
    whole = (await api.post(URL, json={"messages": MESSAGES, "tools": TOOLS, "seed": 1})).json()
    assert body["usage"]["completion_tokens"] < whole["usage"]["completion_tokens"]


async def test_openais_client_puts_a_stream_together(
    calling: FakeReplica, make_app: Callable[..., Starlette], serve: Callable[[Starlette], Awaitable[str]]
) -> None:
    url = await serve(make_app(calling))
    async with (
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client,
        client.chat.completions.stream(model="tiny", messages=MESSAGES, tools=TOOLS) as stream,
    ):
        events = [event async for event in stream]
        final = await stream.get_final_completion()
    done = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert [(event.name, json.loads(event.arguments)) for event in done] == [("get_weather", CITY), ("get_time", CITY)]
    (choice,) = final.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I look.")
    assert [call.function.name for call in choice.message.tool_calls or ()] == ["get_weather", "get_time"]
