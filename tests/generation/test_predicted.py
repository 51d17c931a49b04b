from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.generation.predicted import Prediction, PredictionCount


def counted(predicted: list[int], output: list[int]) -> tuple[int, int]:
    count = PredictionCount(Prediction(predicted))
    count.push(output)
    return count.accepted, count.rejected


@pytest.mark.parametrize(
    ("predicted", "output", "accepted"),
    [
        ([], [1, 2], 0),
        ([1, 2, 3], [], 0),
        ([1, 2, 3], [1, 2, 3], 3),
        ([1, 2, 3], [1, 2, 3, 4], 3),
        ([1, 2, 3], [9, 9, 9], 0),
        ([1, 2, 3, 4, 5], [1, 2, 9, 4, 5], 4),  # one token is another
        ([1, 2, 3, 4, 5], [1, 2, 9, 9, 3, 4, 5], 5),  # two more
        ([1, 2, 3, 4, 5, 6], [1, 2, 5, 6], 4),  # two fewer
        ([1, 2, 3, 4], [9, 1, 2, 3, 4], 4),
        ([1, 2, 3, 4], [3, 4, 1, 2], 2),  # what is behind stays behind
        ([1, 1, 1, 1], [1, 1], 2),
        ([5], [9, 5], 0),  # a single token may be there by chance
    ],
)
def test_tokens_in_the_same_order_count(predicted: list[int], output: list[int], accepted: int) -> None:
    assert counted(predicted, output) == (accepted, len(predicted) - accepted)


@given(st.lists(st.integers(0, 3), max_size=30), st.lists(st.integers(0, 3), max_size=30), st.integers(1, 5))
def test_it_is_a_function_of_the_two_texts(predicted: list[int], output: list[int], piece: int) -> None:
    pieces = PredictionCount(Prediction(predicted))
    for first in range(0, len(output), piece):
        pieces.push(output[first : first + piece])
    assert (pieces.accepted, pieces.rejected) == counted(predicted, output)
    assert 0 <= pieces.accepted <= min(len(predicted), len(output))
    assert counted(predicted, predicted) == (len(predicted), 0)


def test_choices_share_the_index_and_an_answer_as_predicted_needs_none() -> None:
    prediction = Prediction([1, 2, 3, 1, 2, 4])
    first, second, third = (PredictionCount(prediction) for _ in range(3))
    first.push([1, 2, 3, 1, 2, 4, 9])
    assert (first.accepted, "places" in vars(prediction)) == (6, False)
    second.push([1, 2, 4])
    third.push([1, 2, 4])
    assert second.accepted == third.accepted == 3, "one choice uses up nothing of another's"
    assert "places" in vars(prediction)
