"""Where a grammar stands is a function of the output's ids, however a constraint came there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import jsonschema
import numpy as np
import pytest
from exploring import cases
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLParserLimits
from small_vocabulary import EOS, grammar_of, ids_of, schemas, small_vocabulary, text_of
from tiny_models import VOCAB, request_for

from serve_app.core import SamplingParams
from serve_app.engine import masks as masks_module
from serve_app.engine.constraint import Constraint
from serve_app.engine.masks import MaskBuilder, Masks, Place
from serve_app.grammar import compile_grammar

BUILDER = MaskBuilder(VOCAB, threads=2)
TEXT_STOP = ids_of("b")[0]


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks_module, "GRACE_S", 20)


def constraint_of(
    grammar: str, output: Sequence[int] = (), stops: tuple[int, ...] = (EOS,), least: int = 0
) -> Constraint:
    request = request_for([1], stop_token_ids=stops, sampling=SamplingParams(seed=0, min_tokens=least))
    vocabulary = small_vocabulary()
    constraint = Constraint(vocabulary, compile_grammar(vocabulary, grammar).deep_copy(), request)
    constraint.advance(output)
    return constraint


def masks_of(*places: tuple[Constraint, Sequence[int]]) -> tuple[list[set[int]], Masks]:
    """The ids that each row allows, where none is late."""
    rows, row = [], 3
    for constraint, draft in places:
        rows.append(Place(row, constraint, tuple(draft)))
        row += 1 + len(draft)
    masks = BUILDER.start(rows).collect(others=True)
    assert masks.rows == list(range(3, row))
    bits = np.unpackbits(masks.words.view(np.uint8), axis=1, bitorder="little")
    return [set(np.flatnonzero(row).tolist()) for row in bits], masks


def allowed(constraint: Constraint) -> set[int]:
    return masks_of((constraint, ()))[0][0]


def regex(pattern: str) -> str:
    return LLMatcher.grammar_from_regex(pattern)


@settings(max_examples=cases(20, exploring=500))
@given(schema=schemas, data=st.data())
def test_masks_are_the_same_by_replay_step_by_step_and_after_drafts(
    schema: dict[str, Any], data: st.DataObject
) -> None:
    grammar = grammar_of(schema)
    walked = constraint_of(grammar)
    output: list[int] = []
    while len(output) < 60:
        replayed = constraint_of(grammar, output)
        assert walked.complete == replayed.complete
        expected = allowed(replayed)
        assert allowed(walked) == expected
        forced = walked.forced()
        if forced:
            assert expected == {forced[0]}
        going = sorted(expected - {EOS})
        if not going:
            break
        draft = _draft(grammar, output, data)
        alone = [allowed(constraint_of(grammar, [*output, *draft[:n]])) for n in range(1 + len(draft))]
        assert masks_of((walked, draft))[0] == alone
        assert walked.allowed([*draft, EOS]) == len(draft)
        assert walked.allowed([*draft, 126]) == len(draft)
        token_id = data.draw(st.sampled_from(going))
        walked.advance([token_id])
        output.append(token_id)
    if EOS in allowed(walked):
        assert walked.failed is None
        jsonschema.validate(json.loads(text_of(output)), schema)


def _draft(grammar: str, output: list[int], data: st.DataObject) -> list[int]:
    """Some ids that may follow the output."""
    draft: list[int] = []
    for _ in range(data.draw(st.integers(0, 3))):
        going = sorted(allowed(constraint_of(grammar, [*output, *draft])) - {EOS})
        if not going:
            break
        draft.append(data.draw(st.sampled_from(going)))
    return draft


def test_many_sequences_in_one_step_have_each_their_own_masks() -> None:
    first, second = constraint_of(regex("abc|na")), constraint_of(regex("[0-9]{3}"))
    copy = constraint_of(regex("abc|na"))
    third = constraint_of(regex("a*b"), ids_of("a"), stops=())
    together, masks = masks_of((first, ()), (second, ids_of("10")), (third, ids_of("b")), (copy, ()))
    assert together[0] == together[-1] == allowed(first)
    assert together[1] == allowed(second)
    assert together[2] == allowed(constraint_of(regex("[0-9]{3}"), ids_of("10")))
    assert together[3] == allowed(third)
    assert together[4] == set()
    assert masks.ended == [7]


@pytest.mark.parametrize("stops", [(EOS,), (EOS, 126, 127), (TEXT_STOP,)])
def test_what_ends_the_output_is_allowed_exactly_where_the_grammar_accepts(stops: tuple[int, ...]) -> None:
    grammar = regex("a[ab]*a")
    for text, accepts in (("", False), ("a", False), ("aa", True), ("aba", True)):
        output = [ids_of(letter)[0] for letter in text]
        assert (set(stops) <= allowed(constraint_of(grammar, output, stops))) == accepts, text
        assert accepts or not set(stops) & allowed(constraint_of(grammar, output, stops)), text
        assert not set(stops) & allowed(constraint_of(grammar, output, stops, least=len(text) + 1)), "too early"
    assert EOS not in allowed(constraint_of(grammar, ids_of("aa"), stops=())), "it is ignored"


def test_min_tokens_count_along_a_draft() -> None:
    constraint = constraint_of(regex("a+"), ids_of("a"), least=3)
    assert [EOS in row for row in masks_of((constraint, ids_of("a") * 3))[0]] == [False, False, True, True]


def test_an_output_is_complete_when_nothing_can_follow() -> None:
    constraint = constraint_of(regex("na?"), ids_of("n"))
    assert (constraint.complete, constraint.failed) == (False, None)
    constraint.advance(ids_of("a"))
    assert (constraint.complete, constraint.failed) == (True, None)


def test_an_output_that_cannot_go_on_says_so() -> None:
    no_such_letter = constraint_of(regex("aé"), ids_of("a"))
    assert masks_of((no_such_letter, ()))[1].ended == [3]
    assert not no_such_letter.complete
    assert "no token that the grammar allows may come next" in (no_such_letter.failed or "")
    needs_its_stop = constraint_of(regex("abb"), ids_of("a"), stops=(TEXT_STOP,))
    assert masks_of((needs_its_stop, ()))[1].ended == [3]
    assert needs_its_stop.failed


def test_an_id_that_no_mask_allows_makes_it_fail() -> None:
    constraint = constraint_of(regex("[a-z]+"), ids_of("abc"))
    constraint.advance(ids_of("1"))
    assert not constraint.complete
    assert "can't go on" in (constraint.failed or "")
    assert "\n" not in (constraint.failed or "")
    rows, masks = masks_of((constraint, ()), (constraint_of(regex("ab*")), ids_of("a")))
    assert (rows[0], masks.ended) == (set(), [3])
    assert EOS in rows[2], "the others have their masks"


def test_a_mask_beyond_the_limits_is_a_failure_of_its_own_sequence() -> None:
    vocabulary = small_vocabulary()
    limits = LLParserLimits(step_lexer_fuel=3, verbose_errors=False)
    matcher = LLMatcher(vocabulary.tokenizer, regex("([a-z]{3}[0-9]){1,9}"), log_level=0, limits=limits)
    constraint = Constraint(vocabulary, matcher, request_for([1], stop_token_ids=(EOS,)))
    rows, masks = masks_of((constraint, ()), (constraint_of(regex("a+b")), ()))
    assert (rows[0], masks.ended) == (set(), [3])
    assert rows[1] == {*ids_of("a"), *ids_of("ab")}
    assert "can't go on within the grammar: " in (constraint.failed or "")
