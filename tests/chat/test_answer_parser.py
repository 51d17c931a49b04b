"""Reasoning, text and calls, told apart in any cut of the text."""

from __future__ import annotations

from itertools import pairwise

import pytest
from answer_cuts import TOOLS, parts_of
from hypothesis import given
from hypothesis import strategies as st

from serve_app.chat.answers import AnswerFormat, new_parser
from serve_app.chat.parts import ArgumentsPart, CallPart, Part, ReasoningPart, TextPart, joined

THINKS = AnswerFormat("</think>", "<think>")
BEGUN = AnswerFormat("</think>")
CALLS = AnswerFormat("</think>", "<think>", "hermes", TOOLS)
CALL = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>\nWell,\nhm.\n</think>\n\nYes.", [ReasoningPart("Well,\nhm."), TextPart("Yes.")]),
        (" \n<think>a</think>b ", [ReasoningPart("a"), TextPart("b ")]),
        ("<think>\n\n</think>\n\nYes.", [TextPart("Yes.")]),
        ("<think>cut off </thi", [ReasoningPart("cut off </thi")]),
        ("Yes <think>a</think>", [TextPart("Yes <think>a</think>")]),
        ("<thin", [TextPart("<thin")]),
        ("  Yes", [TextPart("  Yes")]),
        ("<think>a</think>", [ReasoningPart("a")]),
        ("", []),
    ],
)
def test_reasoning_at_the_beginning_is_no_text(text: str, expected: list[Part]) -> None:
    for answer in (THINKS, CALLS):
        assert parts_of(answer, [text]) == expected
        assert parts_of(answer, list(text)) == expected


def test_a_prompt_may_have_begun_the_reasoning() -> None:
    assert parts_of(BEGUN, ["\nWell.\n</thi", "nk>\nYes."]) == [ReasoningPart("Well."), TextPart("Yes.")]
    assert parts_of(BEGUN, ["Well."]) == [ReasoningPart("Well.")]


def test_the_model_may_reason_call_and_reason_again() -> None:
    text = f"<think>a</think>\n{CALL}\n<think>\nb\n</think>\n\nOne more: \n\n{CALL}\n\nDone.\n"
    expected = [
        ReasoningPart("a"),
        CallPart(0, "now"),
        ArgumentsPart(0, "{}"),
        ReasoningPart("b"),
        TextPart("One more:"),
        CallPart(1, "now"),
        ArgumentsPart(1, "{}"),
        TextPart("Done.\n"),
    ]
    assert parts_of(CALLS, [text]) == expected
    assert parts_of(CALLS, list(text)) == expected


def test_a_call_in_the_reasoning_is_reasoning() -> None:
    assert parts_of(CALLS, [f"<think>{CALL}</think>No."]) == [ReasoningPart(CALL), TextPart("No.")]


def test_without_tools_a_call_is_text() -> None:
    assert parts_of(THINKS, [f"Look: {CALL}"]) == [TextPart(f"Look: {CALL}")]


def test_an_answer_that_may_have_one_call_ends_with_it() -> None:
    answer = AnswerFormat(tool_format="hermes", tools=TOOLS, single_call=True)
    parser = new_parser(answer)
    assert parser.push(f"Well. {CALL[:-12]}") == [TextPart("Well."), CallPart(0, "now"), ArgumentsPart(0, "{}")]
    assert parser.ended
    assert parser.push(CALL) == []
    assert parser.flush() == []


def test_text_waits_for_nothing_but_what_may_be_a_mark() -> None:
    parser = new_parser(CALLS)
    assert parser.push("Let me see") == [TextPart("Let me see")]
    assert parser.push(": <tool") == [TextPart(":")]
    assert parser.push("box>") == [TextPart(" <toolbox>")]


def test_a_name_comes_as_soon_as_it_is_certain_and_arguments_as_they_come() -> None:
    parser = new_parser(CALLS)
    pieces = ['<tool_call>{"name": "get_weather"', ', "arguments": {"ci', 'ty": "Pa', 'ris"}', "}</tool_call>"]
    assert [parser.push(piece) for piece in pieces] == [
        [CallPart(0, "get_weather")],
        [ArgumentsPart(0, '{"ci')],
        [ArgumentsPart(0, 'ty": "Pa')],
        [ArgumentsPart(0, 'ris"}')],
        [],
    ]


@given(st.text(st.sampled_from("<think>/ \nab"), max_size=40), st.sets(st.integers(0, 40)), st.booleans())
def test_every_cut_gives_the_same_parts(text: str, cuts: set[int], begun: bool) -> None:
    text, answer = (text, BEGUN) if begun else (f"<think>{text}", THINKS)
    bounds = [0, *sorted(cut for cut in cuts if cut <= len(text)), len(text)]
    pieces = [text[low:high] for low, high in pairwise(bounds)]
    assert parts_of(answer, pieces) == parts_of(answer, [text])


def test_it_says_whether_it_is_in_the_reasoning() -> None:
    parser = new_parser(THINKS)
    seen = []
    for piece in ("<think>", "Well.", "</think>", "Yes."):
        parser.push(piece)
        seen.append(parser.in_reasoning)
    assert seen == [True, True, False, False]


def test_neighbours_of_a_kind_are_joined_once() -> None:
    """Part by part, 300,000 of them would copy 90 GB."""
    many = 300_000
    parts = [
        *[ReasoningPart("r")] * 2,
        *[TextPart("t")] * many,
        CallPart(0, "a"),
        CallPart(1, "b"),
        ArgumentsPart(1, "{"),
        ArgumentsPart(1, "}"),
        ArgumentsPart(2, "{}"),
    ]
    expected = [ReasoningPart("rr"), TextPart("t" * many), CallPart(0, "a"), CallPart(1, "b")]
    assert joined(parts) == [*expected, ArgumentsPart(1, "{}"), ArgumentsPart(2, "{}")]
    assert joined([]) == []
