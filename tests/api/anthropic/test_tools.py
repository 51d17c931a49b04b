"""Anthropic's tools and the choice among them, as a chat's options and in its prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anthropic
import httpx
import pytest
from fake_replica import FakeReplica, Script, card
from starlette.applications import Starlette

from serve_app.api.anthropic.fields import ToolChoiceFields
from serve_app.api.anthropic.tools import parsed_choice, parsed_tools
from serve_app.api.unknown_fields import UnknownFields
from serve_app.chat.options import Tool, ToolChoice
from serve_app.chat.tokenizer import ChatTokenizer
from serve_app.core import RequestError
from serve_app.observability.logs import RequestRecord

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER: dict[str, Any] = {"name": "weather", "description": "Of a city.", "input_schema": SCHEMA}
HI: dict[str, Any] = {"max_tokens": 500, "messages": [{"role": "user", "content": "Weather?"}]}


def parse(raw: Any) -> tuple[tuple[Tool, ...], list[str]]:
    record = RequestRecord("r1")
    return parsed_tools(raw, UnknownFields(record, refused=False)), record.ignored_fields


def test_a_tool() -> None:
    tools, ignored = parse([{**WEATHER, "strict": True}, {"name": "time", "input_schema": {}}])
    assert tools == (Tool("weather", "Of a city.", SCHEMA, True), Tool("time", "", {}, False))
    assert ignored == []


def test_fields_that_change_nothing_are_taken() -> None:
    harmless = {
        "type": "custom",
        "cache_control": {"type": "ephemeral"},
        "eager_input_streaming": True,
        "defer_loading": False,
        "allowed_callers": ["direct"],
    }
    assert parse([{**WEATHER, **harmless}]) == parse([WEATHER])


def test_examples_are_ignored_and_named() -> None:
    _, ignored = parse([{**WEATHER, "input_examples": [{"city": "Rome"}]}])
    assert ignored == ["tools[].input_examples"]


@pytest.mark.parametrize(
    ("tool", "param"),
    [
        (7, "tools[0]"),
        ({"type": "web_search_20250305", "name": "web_search"}, "tools[0]"),
        ({"type": "bash_20250124", "name": "bash"}, "tools[0]"),
        ({"type": ["custom"], "name": "x"}, "tools[0]"),
        ({"name": "weather"}, "tools[0].input_schema"),
        ({**WEATHER, "input_schema": "{}"}, "tools[0].input_schema"),
        ({**WEATHER, "input_schema": {"x": "\ud800"}}, "tools[0].input_schema"),
        ({**WEATHER, "name": "with space"}, "tools[0].name"),
        ({**WEATHER, "name": None}, "tools[0].name"),
        ({**WEATHER, "description": 7}, "tools[0].description"),
        ({**WEATHER, "strict": "yes"}, "tools[0].strict"),
        ({**WEATHER, "defer_loading": True}, "tools[0].defer_loading"),
        ({**WEATHER, "allowed_callers": ["code_execution_20250825"]}, "tools[0].allowed_callers"),
    ],
)
def test_what_cant_be_offered_is_refused_by_its_place(tool: Any, param: str) -> None:
    with pytest.raises(RequestError) as raised:
        parse([tool])
    assert raised.value.param == param


@pytest.mark.parametrize("raw", [{"a": "b"}, [WEATHER, WEATHER], [WEATHER] * 1000])
def test_lists_that_are_none(raw: Any) -> None:
    with pytest.raises(RequestError) as raised:
        parse(raw)
    assert raised.value.param == "tools"


@pytest.mark.parametrize(
    ("raw", "choice", "parallel"),
    [
        (None, ToolChoice(), True),
        ({"type": "auto"}, ToolChoice(), True),
        ({"type": "auto", "disable_parallel_tool_use": True}, ToolChoice(), False),
        ({"type": "any"}, ToolChoice("required"), True),
        ({"type": "none"}, ToolChoice("none"), True),
        ({"type": "tool", "name": "weather", "disable_parallel_tool_use": True}, ToolChoice("named", "weather"), False),
    ],
)
def test_choices(raw: dict[str, Any] | None, choice: ToolChoice, parallel: bool) -> None:
    tools, _ = parse([WEATHER])
    given = None if raw is None else ToolChoiceFields.model_validate(raw)
    assert parsed_choice(given, tools) == (choice, parallel)


@pytest.mark.parametrize("raw", [{"type": "tool", "name": "other"}, {"type": "tool"}])
def test_a_choice_of_no_tool(raw: dict[str, Any]) -> None:
    tools, _ = parse([WEATHER])
    with pytest.raises(RequestError) as raised:
        parsed_choice(ToolChoiceFields.model_validate(raw), tools)
    assert raised.value.param == "tool_choice"


async def test_tools_and_results_are_in_the_prompt(
    api: httpx.AsyncClient, replica: FakeReplica, tokenizer: ChatTokenizer
) -> None:
    replica.state = card(vocab_size=tokenizer.vocab_size, context_tokens=4096)
    call = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Rome"}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "quick fox", "is_error": True}
    turns = [*HI["messages"], {"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
    response = await api.post("/v1/messages", json={**HI, "messages": turns, "tools": [WEATHER]})
    assert response.status_code == 200, response.text
    prompt = tokenizer.shown(replica.requests[0].prompt_token_ids)
    for text in ("Of a city.", '"city"', "Rome", "Error: quick fox"):
        assert text in prompt
    counted = await api.post("/v1/messages/count_tokens", json={**HI, "messages": turns, "tools": [WEATHER]})
    assert counted.json() == {"input_tokens": len(replica.requests[0].prompt_token_ids)}


async def test_errors_inside_a_call_name_the_callers_place(api: httpx.AsyncClient) -> None:
    deep: Any = {}
    for _ in range(80):
        deep = {"x": deep}
    call = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": deep}
    result = {"type": "tool_result", "tool_use_id": "toolu_1"}
    turns = [*HI["messages"], {"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
    response = await api.post("/v1/messages", json={**HI, "system": "S", "messages": turns, "tools": [WEATHER]})
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith("messages[1].content[0] ")


CITY = {"city": "Röme 🙂"}
CALLS = "".join(
    f'<tool_call>\n{{"name": "{name}", "arguments": {{"city": "R\\u00f6me 🙂"}}}}\n</tool_call>\n'
    for name in ("weather", "time")
)
TOOLS = [WEATHER, {**WEATHER, "name": "time"}]


@pytest.fixture
def caller(writes: Callable[..., Script], tokenizer: ChatTokenizer) -> FakeReplica:
    """A model that says something and calls two tools."""
    state = card(vocab_size=tokenizer.vocab_size, context_tokens=4096)
    return FakeReplica([writes(f"I look.\n{CALLS}")], state=state)


@pytest.mark.parametrize("headers", [{}, {"x-stream-resume": "1"}])
async def test_anthropics_client_puts_calls_together(
    caller: FakeReplica, make_app: Callable[..., Starlette], serve: Callable[[Starlette], Any], headers: dict[str, str]
) -> None:
    client = anthropic.AsyncAnthropic(api_key="none", base_url=await serve(make_app(caller)), max_retries=0)
    async with client.messages.stream(**HI, model="tiny", tools=TOOLS, extra_headers=headers) as stream:
        pieces = [event.partial_json async for event in stream if event.type == "input_json"]
        message = await stream.get_final_message()
    assert len(pieces) > 4
    whole = await client.messages.create(**HI, model="tiny", tools=TOOLS)
    for answer in (message, whole):
        text, weather, time = answer.content
        assert (text.text, answer.stop_reason) == ("I look.", "tool_use")
        assert [(call.name, call.input) for call in (weather, time)] == [("weather", CITY), ("time", CITY)]
        assert weather.id.startswith("toolu_")
    results = [{"type": "tool_result", "tool_use_id": block.id, "content": "Fine."} for block in message.content[1:]]
    turns = [*HI["messages"], message.to_param(), {"role": "user", "content": results}]
    again = await client.messages.create(**{**HI, "messages": turns}, model="tiny", tools=TOOLS)
    assert again.stop_reason == "tool_use"


async def test_one_call_at_most(
    caller: FakeReplica, make_app: Callable[..., Starlette], http: Callable[[Starlette], httpx.AsyncClient]
) -> None:
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    body = {**HI, "tools": TOOLS, "tool_choice": choice}
    answer = (await http(make_app(caller)).post("/v1/messages", json=body)).json()
    assert [block["type"] for block in answer["content"]] == ["text", "tool_use"]
    assert answer["stop_reason"] == "tool_use"


@pytest.mark.parametrize(
    ("choice", "forced"),
    [({"type": "any"}, True), ({"type": "tool", "name": "time"}, True), ({"type": "auto"}, False)],
)
async def test_a_forced_call_is_constrained(
    caller: FakeReplica,
    make_app: Callable[..., Starlette],
    http: Callable[[Starlette], httpx.AsyncClient],
    choice: dict[str, Any],
    forced: bool,
) -> None:
    body = {**HI, "tools": TOOLS, "tool_choice": choice}
    assert (await http(make_app(caller)).post("/v1/messages", json=body)).status_code == 200
    assert bool(caller.requests[0].constraint) == forced
