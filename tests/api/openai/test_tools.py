"""The request fields about tools, and the prompt that comes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fake_replica import FakeReplica, Script, card

from serve_app.api.openai.tools import MAX_TOOLS, chosen, read_tools
from serve_app.chat.conversation import refuse_unknown
from serve_app.chat.options import Tool, ToolChoice
from serve_app.chat.tokenizer import ChatTokenizer
from serve_app.core import RequestError

Writes = Callable[..., Script]

URL = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Weather in Rome?"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


@pytest.fixture
def replica(writes: Writes, tokenizer: ChatTokenizer) -> FakeReplica:
    return FakeReplica([writes()], state=card(vocab_size=tokenizer.vocab_size, context_tokens=2048))


def tool(name: str = "get_weather", **more: object) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}


WEATHER = tool(description="The weather.", parameters=SCHEMA)


def prompt(replica: FakeReplica, tokenizer: ChatTokenizer) -> str:
    return tokenizer.shown(list(replica.requests[-1].prompt_token_ids))


async def test_the_prompt_has_the_tools_the_calls_and_the_results(
    api: httpx.AsyncClient, replica: FakeReplica, tokenizer: ChatTokenizer
) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]
    response = await api.post(URL, json={"messages": messages, "tools": [WEATHER], "parallel_tool_calls": False})
    assert response.status_code == 200, response.text
    assert "x-ignored-fields" not in response.headers
    shown = prompt(replica, tokenizer)
    for part in ('"name": "get_weather", "description": "The weather."', '"arguments": {"city": "Rome"}', "\nrain\n"):
        assert part in shown


async def test_with_tool_choice_none_the_tools_are_not_shown(
    api: httpx.AsyncClient, replica: FakeReplica, tokenizer: ChatTokenizer
) -> None:
    await api.post(URL, json={"messages": MESSAGES})
    plain = prompt(replica, tokenizer)
    response = await api.post(URL, json={"messages": MESSAGES, "tools": [WEATHER], "tool_choice": "none"})
    assert response.status_code == 200, response.text
    assert prompt(replica, tokenizer) == plain


def test_what_is_read_of_a_tool() -> None:
    seen: list[tuple[str, str]] = []
    raw = [{**tool("f", description=None, strict=True, x=1), "cache_control": {}}, tool("a.b-c_1", parameters={})]
    tools = read_tools(raw, lambda where, field: seen.append((where, field)))
    assert tools == (Tool("f", strict=True), Tool("a.b-c_1", parameters={}))
    assert seen == [("tools[0]", "cache_control"), ("tools[0].function", "x")]
    assert read_tools(None, refuse_unknown) == read_tools([], refuse_unknown) == ()


@pytest.mark.parametrize(
    ("raw", "param"),
    [
        ({"type": "function"}, "tools"),
        ("f", "tools"),
        ([5], "tools[0]"),
        ([{}], "tools[0].type"),
        ([{"type": "web_search"}], "tools[0].type"),
        ([{"type": "function"}], "tools[0].function"),
        ([tool("")], "tools[0].function.name"),
        ([tool("a b")], "tools[0].function.name"),
        ([tool("<|im_end|>")], "tools[0].function.name"),
        ([tool("x" * 129)], "tools[0].function.name"),
        ([tool("f\n")], "tools[0].function.name"),
        ([{"type": "function", "function": {"description": "a"}}], "tools[0].function.name"),
        ([tool(description=5)], "tools[0].function.description"),
        ([tool(description="\ud800")], "tools[0].function.description"),
        ([tool(parameters=[])], "tools[0].function.parameters"),
        ([tool(parameters=True)], "tools[0].function.parameters"),
        ([tool(parameters={"\ud800": 1})], "tools[0].function.parameters"),
        ([tool(parameters={"a": float("inf")})], "tools[0].function.parameters"),
        ([tool(strict=1)], "tools[0].function.strict"),
        ([tool("f"), tool("g"), tool("f")], "tools"),
        ([tool(f"f{n}") for n in range(MAX_TOOLS + 1)], "tools"),
    ],
)
def test_tools_that_are_refused(raw: Any, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        read_tools(raw, refuse_unknown)
    assert caught.value.param == param


TWO = (Tool("f"), Tool("g"))
NAMED_F = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("raw", "tools", "choice"),
    [
        (None, TWO, ToolChoice()),
        ("auto", TWO, ToolChoice()),
        ("none", TWO, ToolChoice("none")),
        ("required", TWO, ToolChoice("required")),
        (NAMED_F, TWO, ToolChoice("named", "f")),
        ({"type": "function", "name": "g"}, TWO, ToolChoice("named", "g")),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED_F]}},
            TWO[:1],
            ToolChoice("required"),
        ),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "g"}]},
            TWO[1:],
            ToolChoice(),
        ),
        ({"type": "allowed_tools", "mode": "auto", "tools": []}, (), ToolChoice()),
    ],
)
def test_choices(raw: Any, tools: tuple[Tool, ...], choice: ToolChoice) -> None:
    assert chosen(TWO, raw) == (tools, choice)


def test_choices_without_tools() -> None:
    assert chosen((), "auto") == ((), ToolChoice())
    assert chosen((), "none") == ((), ToolChoice("none"))


@pytest.mark.parametrize(
    ("raw", "tools", "param"),
    [
        ("any", TWO, "tool_choice"),
        (5, TWO, "tool_choice"),
        ({"type": 5}, TWO, "tool_choice"),
        ({"type": "custom", "custom": {"name": "f"}}, TWO, "tool_choice"),
        ({"type": "function"}, TWO, "tool_choice"),
        ({"type": "function", "function": "f"}, TWO, "tool_choice"),
        ({"type": "function", "function": {"name": "h"}}, TWO, "tool_choice"),
        ("required", (), "tool_choice"),
        (NAMED_F, (), "tool_choice"),
        ({"type": "allowed_tools"}, TWO, "tool_choice.allowed_tools"),
        ({"type": "allowed_tools", "tools": []}, TWO, "tool_choice.allowed_tools.mode"),
        ({"type": "allowed_tools", "mode": "required", "tools": []}, TWO, "tool_choice"),
        ({"type": "allowed_tools", "mode": "auto", "tools": [5]}, TWO, "tool_choice.allowed_tools.tools[0]"),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "h"}]},
            TWO,
            "tool_choice.allowed_tools.tools[0]",
        ),
    ],
)
def test_choices_that_are_refused(raw: Any, tools: tuple[Tool, ...], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        chosen(tools, raw)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tools": [tool("a b")]}, "tools[0].function.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "parallel_tool_calls": "yes"}, "parallel_tool_calls"),
        ({"tools": [tool(parameters={"a": {"type": "x" * 40_000}})]}, "messages and tools"),
        ({"tools": [tool(parameters={"enum": list(range(3000))})]}, "messages and tools"),
    ],
)
async def test_a_bad_request_is_refused_by_name(
    api: httpx.AsyncClient, replica: FakeReplica, more: dict[str, Any], param: str
) -> None:
    response = await api.post(URL, json={"messages": MESSAGES, **more})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert replica.requests == []


async def test_without_chats_tools_are_refused(api: httpx.AsyncClient) -> None:
    response = await api.post("/v1/completions", json={"prompt": "Hi", "tools": [WEATHER]})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")
