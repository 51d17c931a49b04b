"""Guesses from a sequence's own past, what they are thought to be worth, and which of them get a row."""

from __future__ import annotations

from itertools import product

import pytest
from exploring import cases
from hypothesis import example, given, settings
from hypothesis import strategies as st

from serve_app.core import Fingerprint, GenerationRequest, SamplingParams
from serve_app.engine import prompt_lookup
from serve_app.engine.prompt_lookup import CANDIDATES, LONGEST_MATCH, ROW_COST, Lookup, count_accepted, share_rows
from serve_app.engine.sequence import Sequence

ALL = 10**9
"""For `index`: more ids than any test has."""


def ids_of(guesses: list[tuple[int, float]]) -> list[int]:
    return [token_id for token_id, _ in guesses]


def lookup_of(ids: list[int]) -> Lookup:
    """One that has indexed them all."""
    lookup = Lookup(ids)
    lookup.index(ALL)
    return lookup


def chances(lookup: Lookup, count: int = 31) -> list[float]:
    return [chance for _, chance in lookup.guess(count)]


@pytest.fixture
def any_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows cost nothing, so that no guess is too uncertain."""
    monkeypatch.setattr(prompt_lookup, "ROW_COST", 0.0)


@pytest.mark.usefixtures("any_chance")
@pytest.mark.parametrize(
    ("ids", "guesses"),
    [
        ([], []),
        ([5], []),
        ([5, 5], []),
        ([1, 2, 3, 4], []),
        ([1, 2, 9, 1, 2], [9, 1, 2, 9, 1]),
        ([1, 2, 3, 9, 2, 3, 4, 1, 2, 3], [9, 2, 3, 4, 1]),  # three ids agree there, two at the later place
        ([2, 3, 9, 2, 3, 4, 2, 3], [4, 2, 3, 4, 2]),  # of equals the latest
        ([7, 8, 7, 8], [7, 8, 7, 8, 7]),  # where the past ends it begins again
        ([6, 6, 6], [6, 6, 6, 6, 6]),
    ],
)
def test_it_goes_on_as_it_did_where_most_of_the_past_agrees(ids: list[int], guesses: list[int]) -> None:
    assert ids_of(lookup_of(ids).guess(5)) == guesses
    assert lookup_of(ids).guess(0) == []


@settings(max_examples=cases(200, exploring=1000), deadline=None)
@given(ids=st.lists(st.integers(0, 3), min_size=1, max_size=60), known=st.integers(0, 60), bulk=st.booleans())
@example(ids=[0, 0, 0, 2, 0, 0, 1, 0, 1, 1, 0, 0], known=0, bulk=False)  # its guesses were too often wrong
def test_every_guess_has_a_precedent(ids: list[int], known: int, bulk: bool) -> None:
    given_ids = ids[:known]
    lookup = lookup_of(given_ids)
    if bulk:
        given_ids.extend(ids[known:])
        lookup.index(ALL)
    for token_id in ids[len(given_ids) :]:
        given_ids.append(token_id)
        lookup.index(ALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompt_lookup, "ROW_COST", 0.0)
        guesses = ids_of(lookup.guess(6))
    history = list(ids)
    for guess in guesses:
        assert [*history[-2:], guess] in [history[i : i + 3] for i in range(len(history) - 2)]
        history.append(guess)
    pairs = [ids[i : i + 2] for i in range(len(ids) - 2)]
    assert bool(guesses) == (len(ids) > 1 and ids[-2:] in pairs)


@settings(max_examples=cases(200, exploring=1000), deadline=None)
@given(
    ids=st.lists(st.integers(0, 3), max_size=80),
    given_ids=st.integers(0, 80),
    reach=st.integers(1, 100),
    slices=st.lists(st.integers(0, 20)),
)
def test_ids_indexed_in_slices_give_the_same_guesses(
    ids: list[int], given_ids: int, reach: int, slices: list[int]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompt_lookup, "MAX_INDEXED_PROMPT_TOKENS", reach)
        patch.setattr(prompt_lookup, "ROW_COST", 0.0)
        known, growing = ids[:given_ids], ids[:given_ids]
        at_once, sliced = lookup_of(known), Lookup(growing)
        unread = min(len(known), reach)
        for token_id in ids[given_ids:]:
            known.append(token_id)
            at_once.index(ALL)
            growing.append(token_id)
            unread += 1
            if slices:
                most = slices.pop()
                assert sliced.index(most) == min(most, unread)
                unread -= min(most, unread)
            assert unread == 0 or sliced.guess(31) == []
        assert sliced.index(ALL) == unread
        assert sliced.guess(31) == at_once.guess(31)
        assert (sliced._latest, sliced._earlier) == (at_once._latest, at_once._earlier)
        assert (sliced._hits, sliced._tries) == (at_once._hits, at_once._tries)


def test_only_the_latest_places_of_a_frequent_pair_are_compared() -> None:
    ids = [9, 9, 1, 2, 50]
    for filler in range(CANDIDATES):
        ids += [100 + filler, 1, 2, 60]
    assert lookup_of([*ids, 9, 9, 1, 2]).guess(1)[0][0] == 60


def test_what_is_too_far_back_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_lookup, "MAX_INDEXED_PROMPT_TOKENS", 8)
    far, near = [1, 2, 3, *range(50, 58), 1, 2], [1, 2, 3, *range(50, 53), 1, 2]
    assert lookup_of(far).guess(1) == []
    assert ids_of(lookup_of([*far, *near]).guess(1)) == [3]
    lookup = lookup_of(far)
    far.extend([7, 50, 51, 1, 2])
    lookup.index(ALL)
    assert ids_of(lookup.guess(1)) == [7]


@pytest.mark.usefixtures("any_chance")
def test_habits_are_learned_from_guesses_that_were_never_drafted() -> None:
    ids = [1, 2, 3, 4, 5, 6, 7, 8] * 3
    lookup = lookup_of(ids)
    before = chances(lookup, 8)
    assert before == sorted(before, reverse=True)
    for token_id in ids[:20]:
        ids.append(token_id)
        lookup.index(ALL)
    right = chances(lookup, 8)
    assert right[7] > 0.6
    assert all(now > then for now, then in zip(right, before, strict=True))
    for new in range(100, 130):  # each time the past seems to repeat itself, it doesn't
        ids.extend((1, 2, new))
        lookup.index(ALL)
    ids.extend((1, 2))
    lookup.index(ALL)
    assert chances(lookup, 1)[0] < 0.1


def test_a_request_that_repeats_itself_gets_longer_drafts_and_one_that_does_not_gets_none() -> None:
    ids = [1, 2, 3, 4, 5, 6, 7, 8, 1, 2]
    lookup = lookup_of(ids)
    lengths = []
    for token_id in [3, 4, 5, 6, 7, 8, 1, 2] * 4:
        lengths.append(share_rows([lookup.guess(31)], 31, 1, ROW_COST)[0])
        ids.append(token_id)
        lookup.index(ALL)
    assert lengths[0] < lengths[8] < lengths[31]
    for new in range(100, 160):
        ids.extend((1, 2, new))
        lookup.index(ALL)
    ids.extend((1, 2))
    lookup.index(ALL)
    assert lookup.guess(31) == []


guesses = st.lists(st.floats(0, 1), max_size=4).map(
    lambda factors: [(0, _product(factors[: place + 1])) for place in range(len(factors))]
)


def _product(factors: list[float]) -> float:
    result = 1.0
    for factor in factors:
        result *= factor
    return result


@settings(max_examples=cases(200, exploring=1000), deadline=None)
@given(
    sequences=st.lists(guesses, min_size=1, max_size=3),
    rows=st.integers(-1, 14),
    others=st.integers(0, 8),
    row_cost=st.sampled_from([0.0, 1 / 40, ROW_COST, 0.25, 1.0]),
)
def test_rows_are_shared_out_for_the_most_tokens_per_time(
    sequences: list[list[tuple[int, float]]], rows: int, others: int, row_cost: float
) -> None:
    sampled = len(sequences) + others
    lengths = share_rows(sequences, rows, sampled, row_cost)

    def rate(lengths: tuple[int, ...] | list[int]) -> float:
        tokens = sampled + sum(
            chance for of, length in zip(sequences, lengths, strict=True) for _, chance in of[:length]
        )
        return tokens / (1 + row_cost * (sampled - 1 + sum(lengths)))

    assert sum(lengths) <= max(0, rows)
    possible = product(*(range(len(of) + 1) for of in sequences))
    best = max(rate(option) for option in possible if sum(option) <= max(0, rows))
    assert rate(lengths) >= best - 1e-9


def test_the_fuller_the_step_the_surer_a_guess_must_be() -> None:
    def shares(rows: int, sampled: int, *of: tuple[float, ...], row_cost: float = ROW_COST) -> list[int]:
        return share_rows([[(0, chance) for chance in one] for one in of], rows, sampled, row_cost)

    assert shares(30, 1, (0.9, 0.5, 0.2), row_cost=0.25) == [2]
    assert shares(30, 1, (0.2, 0.1)) == [2]
    assert shares(30, 8, (0.2, 0.1)) == [0]
    assert shares(30, 8, (0.9, 0.2), (0.5,)) == [1, 1]
    assert shares(1, 2, (0.9, 0.8), (0.95,)) == [0, 1]


@pytest.mark.parametrize(
    ("draft", "sampled", "right"),
    [((), [4], 0), ((4, 5), [4, 5, 6], 2), ((4, 5), [4, 6, 7], 1), ((4, 5), [3, 5, 6], 0), ((4,), [-1, 4], 0)],
)
def test_guesses_count_up_to_the_first_that_was_wrong(draft: tuple[int, ...], sampled: list[int], right: int) -> None:
    assert count_accepted(draft, sampled) == right


def request(new: int, stop: tuple[int, ...] = (), output: tuple[int, ...] = ()) -> GenerationRequest:
    prompt = (1, 2, 3, 4, 5, 6, 1, 2)
    return GenerationRequest(
        "r", Fingerprint("x"), prompt, SamplingParams(seed=0), new, stop_token_ids=stop, output_token_ids=output
    )


@pytest.mark.usefixtures("any_chance")
def test_a_sequence_guesses_no_further_than_it_may_go() -> None:
    def guesses(request: GenerationRequest) -> list[int]:
        one = Sequence(request, 1)
        assert one.guesses(5) == [], "nothing is indexed yet"
        one.index(100)
        return ids_of(one.guesses(5))

    assert guesses(request(20)) == [3, 4, 5, 6, 1]
    assert guesses(request(4)) == [3, 4, 5], "and the fourth is sampled behind them"
    assert guesses(request(1)) == []
    assert guesses(request(20, stop=(5, 9))) == [3, 4], "what is behind a stop id is never wanted"
    assert guesses(request(20, output=(3, 4))) == [5, 6, 1, 2, 3], "continued from an earlier attempt"


def test_a_long_match_says_no_more_than_the_longest_that_is_told_apart() -> None:
    ids = list(range(40)) * 2
    lookup = lookup_of(ids)
    first, second = chances(lookup, 2)
    assert second == pytest.approx(first**2)
    assert len(ids) > LONGEST_MATCH


def predicting(prompt: list[int], predicted: list[int], output: list[int], piece: int = ALL) -> Lookup:
    """One that has indexed all, the output token by token."""
    ids = list(prompt)
    lookup = Lookup(ids, predicted, len(prompt))
    while lookup.index(piece):
        pass
    for token_id in output:
        ids.append(token_id)
        lookup.index(ALL)
    return lookup


@pytest.mark.usefixtures("any_chance")
@pytest.mark.parametrize(
    ("prompt", "predicted", "output", "guesses"),
    [
        ([1, 2], [5, 6, 7], [], [5, 6, 7]),  # from its beginning
        ([1, 2], [5, 6, 7], [5], [6, 7]),
        ([1, 2], [5, 6, 7], [5, 6, 7], []),  # behind its end nothing is known
        ([1, 2], [5, 6, 7, 8, 9], [5, 3, 7, 8], [9]),  # back where two ids agree
        ([7, 8, 4, 1], [5, 7, 8, 3], [6, 7, 8], [3]),  # rather than in the prompt
        ([7, 8, 4, 1], [5, 6, 3], [6, 7, 8], [4, 1]),  # the prompt is looked up too, up to its end
        ([1, 2], [1, 2], [], [1, 2]),
        ([3], [2**31 - 1], [], [2**31 - 1]),
    ],
)
def test_a_prediction_is_guessed_from_its_beginning_and_found_again(
    prompt: list[int], predicted: list[int], output: list[int], guesses: list[int]
) -> None:
    for piece in (1, 2, ALL):
        assert ids_of(predicting(prompt, predicted, output, piece).guess(10)) == guesses


def test_an_output_that_has_begun_does_not_begin_again() -> None:
    """An attempt that continues an output on another replica."""
    lookup = Lookup([1, 2, 5, 6], [5, 6, 7, 8], 2)
    lookup.index(ALL)
    assert ids_of(lookup.guess(5))[:1] in ([], [7])
    lookup = Lookup([1, 2, 9, 9], [5, 6, 7, 8], 2)
    lookup.index(ALL)
    assert lookup.guess(5) == []


@given(
    st.lists(st.integers(0, 4), max_size=20),
    st.lists(st.integers(0, 4), min_size=1, max_size=20),
    st.lists(st.integers(0, 4), max_size=30),
)
def test_guesses_are_always_ids(prompt: list[int], predicted: list[int], output: list[int]) -> None:
    ids = list(prompt)
    lookup = Lookup(ids, predicted, len(prompt))
    for token_id in [*output, 0]:
        lookup.index(3)
        assert set(ids_of(lookup.guess(31))) <= {0, 1, 2, 3, 4}
        ids.append(token_id)
