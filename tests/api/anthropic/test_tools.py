"""Anthropic's tools and the choice among them, as a chat's options and in its prompt."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from fake_replica import FakeReplica, card

from serve_app.api.anthropic.fields import ToolChoiceFields
from serve_app.api.anthropic.tools import parsed_choice, parsed_tools
from serve_app.api.unknown_fields import UnknownFields
from serve_app.chat.options import Tool, ToolChoice
from serve_app.chat.tokenizer import ChatTokenizer
from serve_app.core import RequestError
from serve_app.observability.logs import RequestRecord

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER: dict[str, Any] = {"name": "weather", "description": "Of a city.", "input_schema": SCHEMA}
HI: dict[str, Any] = {"max_tokens": 100, "messages": [{"role": "user", "content": "Weather?"}]}


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
