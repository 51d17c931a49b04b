"""Tool calls in earlier messages: read, checked, and answered in order."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from line_count import lines_run

from serve_app.chat.conversation import ChatMessage, parse_messages
from serve_app.chat.json_values import MAX_DEPTH, MAX_VALUES, JsonLimit, texts_in, with_texts
from serve_app.chat.prompt_error import PromptError
from serve_app.chat.tool_calls import ToolCall
from serve_app.chat.tool_turns import arranged


def calling(*arguments: object, **more: object) -> dict[str, Any]:
    calls = [
        {"id": f"c{n}", "type": "function", "function": {"name": f"f{n}", "arguments": text}}
        for n, text in enumerate(arguments)
    ]
    return {"role": "assistant", "content": None, "tool_calls": calls, **more}


def test_a_call_and_its_result() -> None:
    raw = [
        calling('{"city": "Rome", "days": 2} '),
        {"role": "tool", "tool_call_id": "c0", "content": [{"type": "text", "text": "rain"}]},
    ]
    call = ToolCall("c0", "f0", {"city": "Rome", "days": 2}, '{"city": "Rome", "days": 2}')
    assert parse_messages(raw) == [
        ChatMessage("assistant", "", tool_calls=(call,)),
        ChatMessage("tool", "rain", tool_call_id="c0"),
    ]


@pytest.mark.parametrize("arguments", ["", None, "{}", {}])
def test_no_arguments_are_an_empty_object(arguments: object) -> None:
    assert parse_messages([calling(arguments)])[0].tool_calls == (ToolCall("c0", "f0", {}, "{}"),)


def test_what_clients_send_beside_a_call_is_ignored_and_named() -> None:
    call = {"index": 0, "type": "function", "id": None, "function": {"name": "f", "arguments": {"a": 1}, "x": 1}}
    seen: list[tuple[str, str]] = []
    raw = [{"role": "assistant", "content": "Hm", "tool_calls": [call], "tool_call_id": "x"}]
    messages = parse_messages(raw, lambda where, field: seen.append((where, field)))
    assert messages[0].tool_calls == (ToolCall("messages[0].tool_calls[0]", "f", {"a": 1}, '{"a": 1}'),)
    assert seen == [
        ("messages[0]", "tool_call_id"),
        ("messages[0].tool_calls[0]", "index"),
        ("messages[0].tool_calls[0].function", "x"),
    ]


FUNCTION = "messages[0].tool_calls[0].function"
DEEP = '{"a": ' * MAX_DEPTH + "1" + "}" * MAX_DEPTH


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("Rome", "JSON object"),
        ("[1]", "JSON object"),
        ("null", "JSON object"),
        ('{"a": 1', "JSON object"),
        ('{"a": NaN}', "not finite"),
        ('{"a": 1e999}', "not finite"),
        ('{"a": [-Infinity]}', "not finite"),
        ('{"a": ' + "9" * 5000 + "}", "JSON object"),
        ("[" * 100_000, "JSON object"),
        ('{"a": ' + DEEP + "}", "nested more than"),
        ('{"a": "\\ud800"}', "surrogate"),
        ('{"\\ud800": 1}', "surrogate"),
        (json.dumps({"a": [0] * MAX_VALUES}), f"at most {MAX_VALUES}"),
        (5, "text of a JSON object"),
    ],
)
def test_arguments_that_are_refused(arguments: object, words: str) -> None:
    with pytest.raises(PromptError) as caught:
        parse_messages([calling(arguments)])
    assert caught.value.param == f"{FUNCTION}.arguments"
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("calls", "param"),
    [
        ("f", "messages[0].tool_calls"),
        ([5], "messages[0].tool_calls[0]"),
        ([{"id": "x"}], FUNCTION),
        ([{"type": "custom", "custom": {}}], "messages[0].tool_calls[0].type"),
        ([{"function": {"arguments": "{}"}}], f"{FUNCTION}.name"),
        ([{"function": {"name": "", "arguments": "{}"}}], f"{FUNCTION}.name"),
        ([{"function": {"name": "x" * 257, "arguments": "{}"}}], f"{FUNCTION}.name"),
        ([{"function": {"name": "\ud800", "arguments": "{}"}}], f"{FUNCTION}.name"),
        ([{"id": 5, "function": {"name": "f", "arguments": "{}"}}], "messages[0].tool_calls[0].id"),
    ],
)
def test_calls_that_are_refused(calls: object, param: str) -> None:
    with pytest.raises(PromptError) as caught:
        parse_messages([{"role": "assistant", "content": "a", "tool_calls": calls}])
    assert caught.value.param == param


def test_the_limit_counts_all_calls_of_a_request() -> None:
    half = json.dumps({"a": [0] * (MAX_VALUES // 2)})
    with pytest.raises(PromptError, match="at most"):
        parse_messages([calling(half), calling(half)])


def result(text: str, call_id: str | None = None, name: str | None = None) -> ChatMessage:
    return ChatMessage("tool", text, name, tool_call_id=call_id)


def call(number: int) -> ToolCall:
    return ToolCall(f"c{number}", f"f{number}", {}, "{}")


def said(*numbers: int, content: str = "") -> ChatMessage:
    return ChatMessage("assistant", content, tool_calls=tuple(map(call, numbers)))


USER = ChatMessage("user", "Hi")


def test_results_stand_in_the_order_of_their_calls() -> None:
    chat = [USER, said(0, 1, 2), result("b", "c1"), result("z", "c9"), result("c", "c2"), result("a", "c0"), USER]
    ordered = [result("a", "c0", "f0"), result("b", "c1", "f1"), result("c", "c2", "f2"), result("z", "c9")]
    assert arranged(chat, one_call=False) == [USER, said(0, 1, 2), *ordered, USER]


def test_results_without_ids_answer_the_calls_that_are_left() -> None:
    chat = [said(0, 1, 2), result("b", "c1"), result("a"), result("c", name="own"), result("d")]
    ordered = [result("a", "c0", "f0"), result("b", "c1", "f1"), result("c", "c2", "own"), result("d")]
    assert arranged(chat, one_call=False) == [said(0, 1, 2), *ordered]


def test_results_that_share_an_id_answer_the_calls_that_share_it_in_order() -> None:
    calls = replace(said(0, 1), tool_calls=tuple(replace(call, id="same") for call in said(0, 1).tool_calls))
    chat = [calls, result("a", "same"), result("b", "same"), result("c", "same")]
    ordered = [result("a", "same", "f0"), result("b", "same", "f1"), result("c", "same", "f1")]
    assert arranged(chat, one_call=False) == [calls, *ordered]
    assert arranged([calls, result("a", "same"), result("b")], one_call=False) == [calls, *ordered[:2]]


def test_one_call_to_a_message() -> None:
    chat = [USER, said(0, 1, content="Hm"), result("b", "c1"), result("a", "c0"), USER]
    assert arranged(chat, one_call=True) == [
        *(USER, said(0, content="Hm"), result("a", "c0", "f0")),
        *(said(1), result("b", "c1", "f1"), USER),
    ]


def test_results_without_a_call_stay_where_they_are() -> None:
    chat = [USER, result("a", "c0"), said(0), USER, result("b", "c0")]
    assert arranged(chat, one_call=False) == chat


def test_the_cost_of_a_call_does_not_grow_with_their_number() -> None:
    def lines(calls: int) -> int:
        chat = [said(*range(calls)), *(result("x", f"c{calls - 1 - n}") for n in range(calls))] * 3
        assert len(arranged(chat, one_call=True)) == 6 * calls
        return lines_run(lambda: arranged(chat, one_call=True))

    assert lines(200) < 2.2 * lines(100)


def test_changed_keys_stay_apart() -> None:
    value = {"a<": 1, "a>": {"b": ["<"]}, "ax": 2, "ax1": 3}
    changed = with_texts(value, lambda text: text.replace("<", "x").replace(">", "x"))
    assert changed == {"ax": 1, "ax1": {"b": ["x"]}, "ax2": 2, "ax11": 3}


def test_many_keys_that_become_equal_cost_no_more() -> None:
    def lines(keys: int) -> int:
        value = {f"{number:017b}": 0 for number in range(keys)}
        assert len(with_texts(value, lambda text: "x")) == keys
        return lines_run(lambda: with_texts(value, lambda text: "x"))

    assert lines(2000) < 2.2 * lines(1000)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=10,
)


@given(value=values)
def test_every_text_is_found_and_changed(value: Any) -> None:
    JsonLimit().check(value, "x")
    marked = with_texts(value, lambda text: f"<{text}>")
    assert list(texts_in(marked)) == [f"<{text}>" for text in texts_in(value)]
    assert json.loads(json.dumps(marked)) == marked
    assert with_texts(marked, lambda text: text[1:-1]) == value
