"""What a request of the Responses API may say, what it may not, and what the model reads of it."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from exploring import cases
from fake_replica import FakeReplica, card
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from responses_api import create
from starlette.applications import Starlette

from serve_app.api.responses.conversation import MAX_CHARS
from serve_app.api.responses.fields import ResponseRequest
from serve_app.api.responses.items import compaction, read_items, summary_of
from serve_app.api.responses.messages import Messages
from serve_app.api.unknown_fields import UnknownFields
from serve_app.chat.prompt_error import PromptError
from serve_app.chat.tokenizer import ChatTokenizer
from serve_app.core import RequestError
from serve_app.observability.logs import RequestRecord

MakeApp = Callable[..., Starlette]
Http = Callable[[Starlette], httpx.AsyncClient]
USER = {"role": "user", "content": "Hi"}
CALL = {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"}


def messages_of(*items: dict[str, Any], instructions: str | None = None) -> list[dict[str, Any]]:
    unknown = UnknownFields(RequestRecord("r1"), refused=True)
    return Messages(instructions, read_items(list(items), "resp_" + "a" * 22, unknown), 0).messages


def test_items_become_the_turns_of_a_chat() -> None:
    made = messages_of(
        {"role": "developer", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        USER,
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
        CALL,
        {**CALL, "call_id": "c2"},
        {"type": "function_call_output", "call_id": "c1", "output": "1"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "2"}]},
        {**CALL, "call_id": "c3"},
        instructions="Be brief.",
    )
    function = {"name": "look", "arguments": "{}"}
    calls = [{"id": f"c{n}", "type": "function", "function": function} for n in (1, 2, 3)]
    assert made == [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": "a\nb"},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "I look.", "reasoning_content": "Hm.", "tool_calls": calls[:2]},
        {"role": "tool", "tool_call_id": "c1", "content": "1"},
        {"role": "tool", "tool_call_id": "c2", "content": "2"},
        {"role": "assistant", "content": None, "tool_calls": calls[2:]},
    ]


def test_an_error_names_the_item_that_was_sent() -> None:
    items = read_items([USER, CALL, CALL, USER], "resp_x", UnknownFields(RequestRecord("r1"), refused=True))
    written = Messages("Be brief.", items, 1)
    cut = Messages(None, items[2:], -1)
    assert cut.place("messages[1].content") == "input[2].content", "the first two items were dropped"
    for message, place in ((0, "instructions"), (1, "previous_response_id"), (3, "input[2]")):
        error = written.named(PromptError(f"messages[{message}].content is bad.", param=f"messages[{message}].content"))
        assert (error.message, error.param) == (f"{place}.content is bad.", f"{place}.content")


LOOK = {"type": "function", "name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}}
DEEP = "serve_app-1:" + base64.b64encode(b"[" * 200_000).decode()
"""A compaction of ours that nests too deeply to be read."""
SCHEMA = {"type": "json_schema", "name": "x", "schema": {"type": "object"}}
LONG_FORMAT = {"type": "json_schema", "name": "a", "schema": {"type": "object"}, "description": "x" * 2**20}
REFUSED: list[tuple[dict[str, Any], str | None]] = [
    ({}, "input"),
    ({"input": None}, "input"),
    ({"input": []}, "input"),
    ({"input": 3}, "input"),
    ({"input": ["Hi"]}, "input[0]"),
    ({"input": [{}]}, "input[0].id"),
    ({"input": [{"type": "computer_call"}]}, "input[0].type"),
    ({"input": [{"type": ["x"]}]}, "input[0].type"),
    ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0]"),
    ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
    ({"input": [{**USER, "id": ""}]}, "input[0].id"),
    ({"input": [{"type": "function_call", "call_id": 3}]}, "input[0].call_id"),
    ({"input": [{"type": "function_call_output", "call_id": "c", "output": 3}]}, "input[0].output"),
    ({"input": [{"type": "reasoning", "summary": "x"}]}, "input[0].summary"),
    ({"input": [{"type": "compaction", "encrypted_content": "gAAA"}]}, "input[0].encrypted_content"),
    ({"input": [{"type": "compaction", "encrypted_content": DEEP}]}, "input[0].encrypted_content"),
    ({"input": [{"role": "user", "content": [{"type": [], "text": "x"}]}]}, "input[0].content[0]"),
    ({"input": "Hi", "max_output_tokens": 10**23}, "max_output_tokens"),
    ({"input": "Hi", "max_tool_calls": 10**23}, "max_tool_calls"),
    ({"input": "Hi", "text": {"format": LONG_FORMAT}}, None),
    ({"input": [{"type": "reasoning", "summary": [{"text": "x" * MAX_CHARS}]}, USER]}, "input"),
    ({"input": "Hi", "text": {"format": {**SCHEMA, "name": ["x"]}}}, "text.format.name"),
    ({"input": "Hi", "text": {"format": {**SCHEMA, "schema": {"maximum": 10**23}}}}, "text.format.schema"),
    ({"input": "Hi", "tools": [{**LOOK, "parameters": {"maximum": 10**23}}]}, "tools[0].parameters"),
    ({"input": "Hi", "conversation": "conv_1"}, "conversation"),
    ({"input": "Hi", "prompt": {"id": "p"}}, "prompt"),
    ({"input": "Hi", "max_tokens": 3}, "max_tokens"),
    ({"input": "Hi", "n": 2}, "n"),
    ({"input": "Hi", "response_format": {"type": "json_object"}}, "response_format"),
    ({"input": "Hi", "context_management": [{"type": "compaction"}]}, "context_management"),
    ({"input": "Hi", "include": ["x"]}, "include"),
    ({"input": "Hi", "metadata": {"a": 3}}, "metadata"),
    ({"input": "Hi", "metadata": {"a": "x" * 513}}, "metadata"),
    ({"input": "Hi", "max_output_tokens": 0}, "max_output_tokens"),
    ({"input": "Hi", "truncation": "some"}, "truncation"),
    ({"input": "Hi", "top_logprobs": 21}, "top_logprobs"),
    ({"input": "Hi", "text": {"format": {"type": "audio"}}}, "text.format.type"),
    ({"input": "Hi", "text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
]


@pytest.mark.parametrize(("body", "param"), REFUSED)
async def test_what_can_not_be_served_is_refused_by_name(
    replica: FakeReplica, make_app: MakeApp, http: Http, body: dict[str, Any], param: str | None
) -> None:
    replica.state = replace(replica.state, context_tokens=2**24, kv_capacity_tokens=2**24)  # nothing is too long for it
    response = await http(make_app(replica, max_body_bytes=2**24)).post("/v1/responses", json=body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


async def test_no_value_of_a_field_is_a_mistake_of_the_server(api: httpx.AsyncClient) -> None:
    nested: Any = "x"
    for _ in range(150):
        nested = [nested]
    for value in ([], {"a": []}, 10**23, "1" * 5000, nested):
        for name in ResponseRequest.model_fields:
            response = await api.post("/v1/responses", json={"input": "Hi", "max_output_tokens": 1, name: value})
            assert response.status_code < 500, (name, value)
    response = await api.post("/v1/responses", content=b'{"input": "Hi", "seed": ' + b"1" * 5000 + b"}")
    assert response.status_code == 400


@pytest.mark.parametrize("number", ["0" * 5000, "0" * 12 + "9" * 20, "\N{SUPERSCRIPT TWO}", "1_0", ""])
async def test_a_number_in_a_query_is_short(api: httpx.AsyncClient, number: str) -> None:
    first = await create(api)
    for path in (f"/input_items?limit={number}", f"?stream=true&starting_after={number}"):
        assert (await api.get(f"/v1/responses/{first['id']}{path}")).status_code == 400


async def test_a_response_repeats_what_is_served(replica: FakeReplica, make_app: MakeApp, http: Http) -> None:
    replica.state = replace(replica.state, context_tokens=4096)
    api = http(make_app(replica))
    named = {"type": "function", "name": "look"}
    tool = {**LOOK, "cache_control": {"type": "ephemeral"}}
    document = await create(
        api,
        tools=[tool],
        tool_choice={"type": "allowed_tools", "mode": "auto", "tools": [{**named, "odd": 1}], "odd": 1},
        text={"format": {"type": "text", "odd": 1}},
    )
    assert document["tools"] == [{**LOOK, "description": None, "strict": False}]
    assert document["tool_choice"] == {"type": "allowed_tools", "mode": "auto", "tools": [named]}
    assert document["text"]["format"] == {"type": "text"}
    chosen = await create(api, tools=[tool], tool_choice={"type": "function", "function": {"name": "look"}})
    assert chosen["tool_choice"] == named


async def test_what_changes_nothing_is_ignored_and_named(api: httpx.AsyncClient) -> None:
    body = {
        "input": [{**USER, "mood": "good"}],
        "reasoning": {"effort": "low", "summary": "auto"},
        "text": {"verbosity": "low"},
        "include": ["reasoning.encrypted_content"],
        "metadata": {},
        "service_tier": "auto",
        "prompt_cache_key": "k",
        "max_tool_calls": 3,
        "n": 1,
        "odd": 1,
    }
    response = await api.post("/v1/responses", json=body)
    assert response.status_code == 200, response.text
    assert set(response.headers["x-ignored-fields"].split(", ")) == {
        "input[].mood",
        "reasoning.effort",
        "reasoning.summary",
        "text.verbosity",
        "include.reasoning.encrypted_content",
        "n",
        "odd",
    }


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "role", "content", "id", "text", "call_id", "name", "arguments", "output"]),
            inner | st.sampled_from(["message", "function_call", "reasoning", "user", "input_text", "item_reference"]),
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(JSON)
@settings(max_examples=cases(15, exploring=150), suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_garbage_is_refused_in_words(raw: Any) -> None:
    unknown = UnknownFields(RequestRecord("r1"), refused=False)
    if not isinstance(raw, str | list):
        return
    items, refused = [], None
    try:
        items = read_items(raw, "resp_" + "a" * 22, unknown)
    except RequestError as error:
        refused = error
    assert refused is None or refused.param
    assert all(item["type"] and item["id"] for item in items)


@given(st.text())
def test_a_summary_comes_back(summary: str) -> None:
    try:
        summary.encode()
    except UnicodeEncodeError:
        return
    assert summary_of(compaction("cmp_1", summary)) == summary


async def test_a_conversation_that_is_too_long_is_refused_or_loses_its_oldest_turns(
    replica: FakeReplica, make_app: MakeApp, http: Http, tokenizer: ChatTokenizer
) -> None:
    replica.state = card(vocab_size=tokenizer.vocab_size, context_tokens=200)
    api = http(make_app(replica))
    turns = [
        turn
        for n in range(20)
        for turn in ({"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": f"answer {n}"})
    ]
    body = {"input": [*turns, {"role": "user", "content": "last"}], "instructions": "Be brief."}
    refused = await api.post("/v1/responses", json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert "input" in refused.json()["error"]["message"]
    response = await create(api, **body, truncation="auto")
    items = (await api.get(f"/v1/responses/{response['id']}/input_items?order=asc&limit=100")).json()["data"]
    assert 1 < len(items) < 41
    assert items == (await api.get(f"/v1/responses/{response['id']}/input_items?order=asc&limit=100")).json()["data"]
    assert items[0]["role"] == "user", "whole turns are dropped"
    prompt = tokenizer.decode(list(replica.requests[-1].prompt_token_ids))
    assert items[0]["content"][0]["text"] in prompt
    assert "question 0" not in prompt
    assert "Be brief." in prompt
    assert "last" in prompt


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "mcp", "server_label": "x"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{**LOOK, "parameters": 3}]}, "tools[0].parameters"),
        ({"tools": [LOOK, LOOK]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [LOOK], "tool_choice": {"type": "function", "name": "other"}}, "tool_choice"),
        ({"tools": [LOOK], "tool_choice": {"type": "web_search"}}, "tool_choice"),
    ],
)
async def test_tools_that_can_not_be_served_are_refused(
    api: httpx.AsyncClient, fields: dict[str, Any], param: str
) -> None:
    response = await api.post("/v1/responses", json={"input": "Hi", **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text
