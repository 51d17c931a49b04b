"""Anthropic's messages as OpenAI-style messages."""

from __future__ import annotations

import json
from typing import Any

import pytest

from serve_app.api.anthropic.conversation import MAX_BLOCKS, Conversation, converted
from serve_app.api.errors import ApiError
from serve_app.api.unknown_fields import UnknownFields
from serve_app.core import RequestError
from serve_app.observability.logs import RequestRecord


def convert(messages: list[dict[str, Any]], system: Any = None) -> tuple[Conversation, list[str]]:
    record = RequestRecord("r1")
    return converted(system, messages, UnknownFields(record, refused=False)), record.ignored_fields


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def user(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def assistant(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": list(blocks)}


CALL = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Köln"}}


def test_a_call_and_its_result() -> None:
    thought = {"type": "thinking", "thinking": "Hm.", "signature": "abc"}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [text("20"), text("dry")]}
    talk, ignored = convert(
        [
            {"role": "user", "content": "Weather?"},
            assistant(thought, text("Let me see."), CALL),
            user(result, text("?")),
        ]
    )
    assert talk.messages == [
        {"role": "user", "content": [text("Weather?")]},
        {
            "role": "assistant",
            "content": [text("Let me see.")],
            "reasoning_content": "Hm.",
            "tool_calls": [
                {
                    "id": "toolu_1",
                    "type": "function",
                    "function": {"name": "weather", "arguments": '{"city": "Köln"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "toolu_1", "content": [text("20"), text("dry")]},
        {"role": "user", "content": [text("?")]},
    ]
    assert talk.places == [
        "messages[0].content",
        "messages[1].content[0]",
        "messages[2].content[0].content",
        "messages[2].content[1]",
    ]
    assert not talk.continues
    assert ignored == []


@pytest.mark.parametrize(
    ("result", "said"),
    [
        ({"content": "20"}, ["20"]),
        ({}, [""]),
        ({"content": None}, [""]),
        ({"content": []}, [""]),
        ({"content": "No such city.", "is_error": True}, ["Error: No such city."]),
        ({"content": [text("No"), text("city")], "is_error": True}, ["Error: No", "city"]),
        ({"is_error": True}, ["Error: "]),
        ({"content": "20", "is_error": False}, ["20"]),
    ],
)
def test_results(result: dict[str, Any], said: list[str]) -> None:
    talk, _ = convert(
        [user(text("?")), assistant(CALL), user({"type": "tool_result", "tool_use_id": "toolu_1", **result})]
    )
    assert [part["text"] for part in talk.messages[-1]["content"]] == said


def test_consecutive_turns_of_a_role_are_one() -> None:
    other = {**CALL, "id": "toolu_2", "input": {}}
    talk, _ = convert(
        [user(text("a")), user(text("b")), assistant(text("c"), CALL), assistant(text("d"), other), user(text("e"))]
    )
    assert [message["role"] for message in talk.messages] == ["user", "assistant", "user"]
    assert [part["text"] for part in talk.messages[1]["content"]] == ["c", "d"]
    assert [call["id"] for call in talk.messages[1]["tool_calls"]] == ["toolu_1", "toolu_2"]


def test_two_results_are_two_messages() -> None:
    results = [{"type": "tool_result", "tool_use_id": f"toolu_{number}", "content": "x"} for number in (1, 2)]
    talk, _ = convert([user(text("?")), assistant(CALL, {**CALL, "id": "toolu_2"}), user(*results)])
    assert [message.get("tool_call_id") for message in talk.messages[2:]] == ["toolu_1", "toolu_2"]


def test_redacted_thinking_is_reported_and_leaves_a_turn() -> None:
    talk, ignored = convert([user(text("a")), assistant({"type": "redacted_thinking", "data": "x"}), user(text("b"))])
    assert [message["role"] for message in talk.messages] == ["user", "assistant", "user"]
    assert ignored == ["messages[].content[].redacted_thinking"]


def test_system_messages_at_the_front_join_the_system_text() -> None:
    talk, _ = convert([{"role": "system", "content": "B"}, user(text("Hi"))], system="A")
    assert talk.messages[0] == {"role": "system", "content": [text("A"), text("B")]}
    assert len(talk.messages) == 2


def test_a_callers_direct_call_is_known() -> None:
    _, ignored = convert([user(text("?")), assistant({**CALL, "caller": {"type": "direct"}}), user(text("x"))])
    assert ignored == []
    _, ignored = convert([user(text("?")), assistant({**CALL, "caller": {"type": "x"}}), user(text("x"))])
    assert ignored == ["messages[].content[].caller"]


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([user({"type": "tool_result", "tool_use_id": "nobody"})], "messages[0].content[0].tool_use_id"),
        ([user(text("a")), assistant(CALL)], "messages[1].content[0]"),
        ([user(text("a")), assistant({**CALL, "input": "{}"}), user(text("b"))], "messages[1].content[0].input"),
        ([user(text("a")), assistant({**CALL, "id": 7}), user(text("b"))], "messages[1].content[0].id"),
        ([user(text("a")), assistant({"type": "thinking"}), user(text("b"))], "messages[1].content[0].thinking"),
        ([user(text("a")), assistant({"type": "server_tool_use"})], "messages[1].content[0]"),
        (
            [
                user(text("a")),
                assistant(CALL),
                user({"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "image"}]}),
            ],
            "messages[2].content[0].content[0]",
        ),
    ],
)
def test_what_cant_be_a_prompt_is_refused_by_its_place(messages: list[dict[str, Any]], param: str) -> None:
    with pytest.raises(ApiError) as raised:
        convert(messages)
    assert (raised.value.status, raised.value.param) == (400, param)
    assert "input" not in json.dumps(raised.value.message) or "input" in param


def test_errors_of_the_prompt_name_the_callers_places() -> None:
    talk, _ = convert([user(text("a")), user(text("b")), assistant(CALL), user(text("c"))], system="S")
    error = RequestError("messages[3].content[0].text holds a marker.", code="x", param="messages[3].content")
    theirs = talk.in_callers_terms(error)
    assert (theirs.param, theirs.message) == ("messages[3].content[0]", "messages[3].content[0] holds a marker.")
    assert talk.in_callers_terms(RequestError("Too long.", code="x", param="messages")).param == "messages"
    assert talk.place("messages[0].content") == "system"
    assert talk.place("messages[1]") == "messages[0].content[0]"


@pytest.mark.parametrize(
    ("messages", "system"),
    [
        ([user(*[text("a")] * (MAX_BLOCKS + 1))], None),
        ([{"role": "user", "content": "a"}] * (MAX_BLOCKS + 1), None),
        ([user(text("a"))], [text("a")] * MAX_BLOCKS),
        (
            [
                user(text("a")),
                assistant(CALL),
                user({"type": "tool_result", "tool_use_id": "toolu_1", "content": [text("a")] * MAX_BLOCKS}),
            ],
            None,
        ),
    ],
)
def test_a_request_has_so_many_blocks_at_most(messages: list[dict[str, Any]], system: Any) -> None:
    with pytest.raises(ApiError, match="at most") as caught:
        convert(messages, system)
    assert caught.value.param


def test_a_block_costs_the_same_behind_many_others() -> None:
    """A turn's blocks are kept in one list, and none is copied when another one comes."""
    half = MAX_BLOCKS // 2
    thoughts = [{"type": "thinking", "thinking": "a", "signature": ""}] * half
    made, _ = convert([assistant(*thoughts, *[text("b")] * (half - 1)), user(text("c"))])
    assert made.messages[0]["reasoning_content"] == "a" * half
    made = Conversation()
    made.add_text("user", "a", "messages[0]")
    parts = made.messages[0]["content"]
    made.add_text("user", "b", "messages[1]")
    assert made.messages[0]["content"] is parts


def test_a_request_without_text_for_the_model_is_refused() -> None:
    billing = text("x-anthropic-billing-header: a")
    with pytest.raises(ApiError, match="no text for the model") as caught:
        convert([{"role": "system", "content": [billing]}], [billing])
    assert caught.value.param == "messages"
