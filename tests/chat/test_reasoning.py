"""Reasoning and answer, told apart in any cut of the text."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.chat.parts import Part, ReasoningPart, TextPart, joined
from serve_app.chat.reasoning import ReasoningParser


def parts_of(pieces: list[str], start: str = "<think>") -> list[Part]:
    parser = ReasoningParser(start, "</think>")
    parts = [part for piece in pieces for part in parser.push(piece)]
    return joined(parts + parser.flush())


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
    assert parts_of([text]) == expected
    assert parts_of(list(text)) == expected


def test_a_prompt_may_have_begun_the_reasoning() -> None:
    assert parts_of(["\nWell.\n</thi", "nk>\nYes."], start="") == [ReasoningPart("Well."), TextPart("Yes.")]
    assert parts_of(["Well."], start="") == [ReasoningPart("Well.")]


@given(st.text(st.sampled_from("<think>/ \nab"), max_size=40), st.sets(st.integers(0, 40)), st.booleans())
def test_every_cut_gives_the_same_parts(text: str, cuts: set[int], begun: bool) -> None:
    text, start = ("" if begun else "<think>") + text, "" if begun else "<think>"
    bounds = [0, *sorted(cut for cut in cuts if cut <= len(text)), len(text)]
    pieces = [text[low:high] for low, high in pairwise(bounds)]
    assert parts_of(pieces, start) == parts_of([text], start)


def test_it_says_whether_it_is_in_the_reasoning() -> None:
    parser = ReasoningParser("<think>", "</think>")
    seen = []
    for piece in ("<think>", "Well.", "</think>", "Yes."):
        parser.push(piece)
        seen.append(parser.in_reasoning)
    assert seen == [True, True, False, False]
