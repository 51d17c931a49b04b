from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.core import TokenBatch, TokenLogprobs
from serve_app.generation.output_tokens import Journal, JournalError, OtherTokens


def test_appends_consecutive_batches() -> None:
    journal = Journal(10)
    journal.append(TokenBatch(0, (5, 6)))
    journal.append(TokenBatch(2, (7,)))
    assert journal.token_ids == [5, 6, 7]
    assert len(journal) == 3


def test_drops_what_overlaps() -> None:
    journal = Journal(10)
    journal.append(TokenBatch(0, (5, 6, 7)))
    journal.append(TokenBatch(1, (6, 7, 8)))
    journal.append(TokenBatch(0, (5,)))
    assert journal.token_ids == [5, 6, 7, 8]


@pytest.mark.parametrize("batch", [TokenBatch(1, (9, 7)), TokenBatch(1, (6, 9, 8)), TokenBatch(0, (9,))])
def test_refuses_a_repetition_of_another_text(batch: TokenBatch) -> None:
    journal = Journal(10)
    journal.append(TokenBatch(0, (5, 6, 7)))
    with pytest.raises(OtherTokens):
        journal.append(batch)
    assert journal.token_ids == [5, 6, 7]


def test_refuses_a_gap_and_stays_as_it_was() -> None:
    journal = Journal(10)
    journal.append(TokenBatch(0, (5,)))
    with pytest.raises(JournalError, match="1 to 2 are missing"):
        journal.append(TokenBatch(3, (9,)))
    assert journal.token_ids == [5]


def test_an_empty_batch_beyond_the_end_is_a_gap_too() -> None:
    with pytest.raises(JournalError):
        Journal(10).append(TokenBatch(1))


def test_refuses_more_than_the_limit() -> None:
    journal = Journal(2)
    with pytest.raises(JournalError, match="more than 2"):
        journal.append(TokenBatch(0, (1, 2, 3)))
    assert journal.token_ids == []


def test_logprobs_stay_aligned_with_their_tokens() -> None:
    journal = Journal(10, with_logprobs=True)
    first, second, third = (TokenLogprobs(-float(i)) for i in range(3))
    journal.append(TokenBatch(0, (5, 6), (first, second)))
    journal.append(TokenBatch(1, (6, 7), (second, third)))
    assert journal.logprobs == [first, second, third]


def test_refuses_tokens_without_their_logprobs() -> None:
    journal = Journal(10, with_logprobs=True)
    with pytest.raises(JournalError, match="logprobs"):
        journal.append(TokenBatch(0, (5,)))
    assert (journal.token_ids, journal.logprobs) == ([], [])


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 6)), max_size=30))
def test_whatever_is_sent_twice_the_output_is_the_sequence(spans: list[tuple[int, int]]) -> None:
    journal = Journal(100)
    for first, length in spans:
        batch = TokenBatch(first, tuple(range(first, first + length)))
        if first > len(journal):
            with pytest.raises(JournalError):
                journal.append(batch)
        else:
            journal.append(batch)
    assert journal.token_ids == list(range(len(journal)))
