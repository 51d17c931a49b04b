"""Verdicts on answers: what is missing, doubled or wrong must be told from what is identical or merely other words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.verdicts import Answer, Verdict, judge, omits, repeats

REFERENCE = Answer(("one two three four",), ("length",), 10, 4, token_ids=(5, 6, 7, 8))
MAX_TOKENS = 4


def verdict(answer: Answer, *, batch_invariant: bool = True) -> Verdict:
    return judge(answer, REFERENCE, MAX_TOKENS, batch_invariant=batch_invariant)


def test_the_same_is_identical() -> None:
    assert verdict(replace(REFERENCE)) is Verdict.IDENTICAL


@pytest.mark.parametrize("batch_invariant", [True, False])
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"texts": ("one two four",), "token_ids": (5, 6, 8)}, Verdict.LOST),
        ({"texts": ("one two",), "token_ids": (5, 6)}, Verdict.LOST),
        ({"texts": (" two three four",), "token_ids": (6, 7, 8)}, Verdict.LOST),
        ({"texts": ("one two two three four",), "token_ids": (5, 6, 6, 7, 8)}, Verdict.DUPLICATED),
        ({"texts": ("one two three four three four",), "token_ids": (5, 6, 7, 8, 7, 8)}, Verdict.DUPLICATED),
        ({"texts": ("one two thr\ufffd four",), "prompt_tokens": 11}, Verdict.CORRUPTED),
        ({"token_ids": (5, 6, 9, 8), "completion_tokens": 5}, Verdict.CORRUPTED),
        ({"token_ids": (5, 6, 9), "completion_tokens": 3}, Verdict.CORRUPTED),
        ({"texts": ()}, Verdict.LOST),
    ],
)
def test_broken_answers_are_found_in_either_mode(
    changes: dict[str, object], expected: Verdict, batch_invariant: bool
) -> None:
    assert verdict(replace(REFERENCE, **changes), batch_invariant=batch_invariant) is expected  # type: ignore[arg-type]


def test_other_words_are_corruption_only_where_bits_are_promised() -> None:
    other = replace(REFERENCE, texts=("one two five six",), token_ids=(5, 6, 9, 4))
    assert verdict(other) is Verdict.CORRUPTED
    assert verdict(other, batch_invariant=False) is Verdict.DIVERGED


def test_an_earlier_end_is_a_divergence_in_the_fast_mode_when_its_counts_say_so() -> None:
    ended = replace(REFERENCE, texts=("one two",), token_ids=(5, 6, 2), completion_tokens=3, finish_reasons=("stop",))
    assert verdict(ended, batch_invariant=False) is Verdict.DIVERGED
    assert verdict(replace(ended, completion_tokens=4), batch_invariant=False) is not Verdict.DIVERGED


def test_a_logprob_that_differs_in_its_last_bit_is_not_identical() -> None:
    entries = (("one", -0.1, ()), ("two", -0.2, (("two", -0.2),)))
    reference = Answer(("onetwo",), ("length",), 3, 2, logprobs=(entries,))
    other = replace(reference, logprobs=((entries[0], ("two", -0.20000000000000004, entries[1][2])),))
    assert judge(other, reference, 2, batch_invariant=True) is Verdict.CORRUPTED
    assert judge(other, reference, 2, batch_invariant=False) is Verdict.DIVERGED
    missing = replace(reference, logprobs=(entries[:1],))
    assert judge(missing, reference, 2, batch_invariant=False) is Verdict.LOST


@given(text=st.text(min_size=1), place=st.integers(0), size=st.integers(1))
def test_any_block_that_is_doubled_or_missing_is_found(text: str, place: int, size: int) -> None:
    start = place % len(text)
    block = text[start : start + 1 + size % len(text)]
    end = start + len(block)
    assert repeats(text[:end] + block + text[end:], text)
    assert omits(text[:start] + text[end:], text)
    assert not repeats(text, text)
    assert not omits(text, text)


@given(text=st.text(alphabet="ab", min_size=2), place=st.integers(0))
def test_a_stranger_in_between_is_no_repetition(text: str, place: int) -> None:
    start = place % len(text)
    assert not repeats(f"{text[:start]}c{text[start:]}", text)


CALLED = replace(REFERENCE, texts=("",), token_ids=None, reasoning=("I look.",), calls=((("f", '{"a": 12345}'),),))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, Verdict.IDENTICAL),
        ({"calls": ((("f", '{"a": 125}'),),)}, Verdict.LOST),
        ({"calls": ((("f", '{"a": 1234512345}'),),)}, Verdict.DUPLICATED),
        ({"calls": ((("g", '{"a": 12345}'),),)}, Verdict.CORRUPTED),
        ({"reasoning": ("I",)}, Verdict.LOST),
        ({"reasoning": ("I see.",)}, Verdict.CORRUPTED),
    ],
)
def test_calls_and_reasoning_count_as_text_does(changes: dict[str, Any], expected: Verdict) -> None:
    assert judge(replace(CALLED, **changes), CALLED, MAX_TOKENS, batch_invariant=True) is expected


@pytest.mark.parametrize(
    ("reason", "sound"), [("end_turn", True), ("max_tokens", True), ("tool_use", True), ("x", False)]
)
def test_each_protocol_has_its_words_for_the_end(reason: str, sound: bool) -> None:
    other = replace(REFERENCE, texts=("uno due tre",), token_ids=None, finish_reasons=(reason,))
    assert judge(other, replace(REFERENCE, token_ids=None), MAX_TOKENS, batch_invariant=False) is (
        Verdict.DIVERGED if sound else Verdict.CORRUPTED
    )
