"""What is asked in a comparison: the same for all, nothing shared by accident."""

from __future__ import annotations

import pytest

from loadtest.compare.workload import (
    PAIRS,
    Cell,
    Reader,
    Set,
    cells,
    chats,
    fingerprint,
    opening,
    pairs,
    requests_of,
    selection,
    strangers,
)

VARIED, SHARED, LONG = (Cell(kind, 8) for kind in Set)


@pytest.mark.parametrize("cell", [VARIED, SHARED, LONG])
def test_the_same_chats_each_time_and_others_in_another_round(cell: Cell) -> None:
    assert chats(cell, "round 0") == chats(cell, "round 0")
    both = [str(chat) for turn in ("round 0", "round 1") for chat in chats(cell, turn)]
    assert len(set(both)) == len(both) == 16


def test_no_prompt_comes_twice_in_many_rounds_nor_opens_as_another() -> None:
    rounds = [f"{phase} {turn}" for phase in ("alone", "round") for turn in range(30)]
    each = [Cell(Set.VARIED, count) for count in (1, 8, 32)]
    asked = [chat[0]["content"] for turn in rounds for cell in each for chat in chats(cell, turn)]
    assert len({text[:17] for text in asked}) == len(asked)


def test_a_shared_set_shares_its_system_prompt_with_the_opening_and_no_other_round() -> None:
    first = opening(SHARED, "round 0")
    assert {chat[0]["content"] for chat in chats(SHARED, "round 0")} == {first[0]["content"]}
    other = chats(SHARED, "round 1")[0][0]["content"]
    assert other[:40] != first[0]["content"][:40]


def test_what_is_asked_cold_has_a_prefix_that_nobody_has_seen() -> None:
    both = [
        chat
        for turn in ("round 0", "round 1")
        for chat in (opening(SHARED, turn), *strangers(SHARED, turn), *(cold for cold, _ in pairs(SHARED, turn)))
    ]
    assert len({chat[0]["content"][:40] for chat in both}) == len(both) == 2 * (1 + 8 + PAIRS)


def test_a_pair_has_its_prefix_in_common_and_not_its_question() -> None:
    for cold, warm in pairs(SHARED, "round 0"):
        assert cold[0] == warm[0]
        assert cold[1]["content"][:20] != warm[1]["content"][:20]


def test_the_fingerprint_is_that_of_what_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint()
    assert before == fingerprint()
    monkeypatch.setattr("loadtest.compare.workload._RULE_COUNT", 14)
    assert fingerprint() != before


def test_long_chats_differ_from_their_first_words() -> None:
    assert len({chat[0]["content"][:80] for chat in chats(LONG, "round 0")}) == 8


def test_one_at_a_time_is_asked_more_than_once() -> None:
    assert requests_of(Cell(Set.VARIED, 1)) == 3
    assert requests_of(Cell(Set.VARIED, 32)) == 32


def test_cells_of_a_selection() -> None:
    chosen = cells(selection("varied,long@1+8", [1, 32]), selection("unpaced,paced@8", [1, 32]))
    assert [str(cell) for cell in chosen] == ["varied, 1", "varied, 32", "long, 1", "long, 8", "varied, 8, paced"]
    assert cells(selection("long", [8]), selection("paced", [8])) == [Cell(Set.VARIED, 8, Reader.PACED)]


@pytest.mark.parametrize("text", ["narrow", "varied@x", "varied@"])
def test_a_wrong_selection_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"narrow|invalid literal"):
        cells(selection(text, [1]), selection("unpaced", [1]))
