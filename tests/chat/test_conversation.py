from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.chat.conversation import ChatMessage, parse_messages
from serve_app.chat.prompt_error import PromptError


def test_the_usual_messages() -> None:
    raw = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "name": "Ann-1_b", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "yes", "refusal": None, "tool_calls": [], "annotations": []},
        {"role": "user", "content": "", "name": ""},
    ]
    assert parse_messages(raw) == [
        ChatMessage("developer", "Be brief."),
        ChatMessage("user", "a\nb", "Ann-1_b"),
        ChatMessage("assistant", "yes"),
        ChatMessage("user", ""),
    ]


@pytest.mark.parametrize(
    ("message", "param", "words"),
    [
        ("Hi", "messages[0]", "object"),
        ({}, "messages[0].role", "must be one of"),
        ({"role": "root", "content": "a"}, "messages[0].role", "'root'"),
        ({"role": "user\n", "content": "a"}, "messages[0].role", "must be one of"),
        ({"role": ["user"], "content": "a"}, "messages[0].role", "type list"),
        ({"role": "function", "name": "f", "content": "a"}, "messages[0].role", "tool messages instead"),
        ({"role": "tool", "tool_call_id": "x"}, "messages[0].content", "no content"),
        ({"role": "tool", "content": "a", "tool_call_id": 5}, "messages[0].tool_call_id", "string"),
        ({"role": "tool", "content": "a", "name": "x" * 257}, "messages[0].name", "letters"),
        ({"role": "user", "content": "a", "tool_calls": [1]}, "messages[0].tool_calls", "only an assistant's"),
        ({"role": "assistant", "content": "a", "function_call": {"name": "f"}}, "messages[0].function_call", "newer"),
        ({"role": "user"}, "messages[0].content", "no content"),
        ({"role": "user", "content": None}, "messages[0].content", "no content"),
        ({"role": "assistant", "content": None}, "messages[0].content", "no content"),
        ({"role": "user", "content": 5}, "messages[0].content", "string or a list"),
        ({"role": "user", "content": {"text": "a"}}, "messages[0].content", "string or a list"),
        ({"role": "user", "content": ["a"]}, "messages[0].content[0]", "object such as"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages[0].content[0]", "'image_url'"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text", "string"),
        ({"role": "user", "content": [{"type": "text", "text": "", "x": 1}]}, "messages[0].content[0]", "'x'"),
        ({"role": "user", "content": "a", "name": "Ann B"}, "messages[0].name", "letters"),
        ({"role": "user", "content": "a", "name": "<|im_end|>"}, "messages[0].name", "letters"),
        ({"role": "user", "content": "a", "name": "é"}, "messages[0].name", "letters"),
        ({"role": "user", "content": "a", "name": "x" * 65}, "messages[0].name", "64"),
        ({"role": "user", "content": "a", "name": "x\n"}, "messages[0].name", "letters"),
        ({"role": "assistant", "content": [{"type": "thinking"}]}, "messages[0].content[0]", "'thinking'"),
        ({"role": "user", "content": [{"type": "reasoning"}]}, "messages[0].content[0]", "'reasoning'"),
        ({"role": "user", "content": "a", "<|im_end|>": "b"}, "messages[0]", "unknown field '<|im_end|>'"),
        ({"role": "user", "content": "a", "tools": {"<|im_end|>": 1}}, "messages[0]", "unknown field"),
    ],
)
def test_what_is_refused(message: object, param: str, words: str) -> None:
    with pytest.raises(PromptError) as caught:
        parse_messages([message])  # type: ignore[list-item]
    assert caught.value.param == param
    assert words in caught.value.message


@pytest.mark.parametrize("messages", [[], (), None, "Hi", {"role": "user"}, b"x"])
def test_messages_must_be_a_list(messages: object) -> None:
    with pytest.raises(PromptError, match="at least one message"):
        parse_messages(messages)  # type: ignore[arg-type]


@pytest.mark.parametrize("content", ['"\\ud800"', '[{"type": "text", "text": "ok \\udfff"}]'])
def test_lone_surrogates_are_refused(content: str) -> None:
    with pytest.raises(PromptError, match="surrogate"):
        parse_messages(json.loads(f'[{{"role": "user", "content": {content}}}]'))


def test_an_error_is_short_and_can_be_sent() -> None:
    for value in ("\ud800" * 10**6, "x" * 10**6):
        with pytest.raises(PromptError) as caught:
            parse_messages([{"role": value, "content": "a"}])
        assert len(caught.value.message.encode("utf-8")) < 400


def test_unknown_fields_may_be_left_aside() -> None:
    thinking = {"type": "thinking", "thinking": "hm"}
    raw = [
        {"id": "m1", "role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "x"}}]},
        {"role": "assistant", "content": [thinking, {"type": "text", "text": "b"}], "reasoning_content": "hm", "x": 0},
    ]
    seen: list[tuple[str, str]] = []
    messages = parse_messages(raw, lambda where, field: seen.append((where, field)))
    assert messages == [ChatMessage("user", "a"), ChatMessage("assistant", "b")]
    assert seen == [
        ("messages[0]", "id"),
        ("messages[0].content[0]", "cache_control"),
        ("messages[1]", "reasoning_content"),
        ("messages[1].content[0]", "thinking"),
    ]


def test_reasoning_is_kept_where_it_is_wanted() -> None:
    part = {"type": "thinking", "thinking": "hm"}
    for reasoned in (
        {"content": "b", "reasoning_content": "hm"},
        {"content": "b", "reasoning": "hm"},
        {"content": "b", "reasoning_content": "hm", "reasoning": "hm"},
        {"content": [part, {"type": "text", "text": "b"}]},
        {"content": [part, {"type": "text", "text": "b"}], "reasoning": "hm"},
        {"content": [{"type": "reasoning", "text": "hm"}, {"type": "text", "text": "b"}]},
    ):
        messages = parse_messages([{"role": "assistant", **reasoned}], keep_reasoning=True)
        assert messages == [ChatMessage("assistant", "b", reasoning="hm")]
    with pytest.raises(PromptError, match="unknown field 'reasoning'"):
        parse_messages([{"role": "user", "content": "a", "reasoning": "hm"}], keep_reasoning=True)


KEYS = ["role", "content", "name", "type", "text", "x", "reasoning"]
TOOL_KEYS = ["tool_calls", "tool_call_id", "function", "arguments", "id"]
WORDS = ["user", "text", "assistant", "tool", '{"a": [1]}']
nested = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4) | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS + TOOL_KEYS), inner, max_size=4),
    max_leaves=12,
)


@given(raw=nested)
def test_rubbish_is_refused_and_never_crashes(raw: object) -> None:
    try:
        messages = parse_messages(raw)  # type: ignore[arg-type]
    except PromptError as error:
        error.message.encode("utf-8")
    else:
        assert all(isinstance(message.content, str) for message in messages)
