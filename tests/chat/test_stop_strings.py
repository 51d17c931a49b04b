from __future__ import annotations

from itertools import pairwise

import pytest
from exploring import cases
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.chat.prompt_error import PromptError
from serve_app.chat.stop_strings import StopStrings, _failure_table

stop_lists = st.lists(st.text(alphabet="ab", min_size=1, max_size=8), max_size=4)


@st.composite
def texts_and_stops(draw: st.DrawFn) -> tuple[str, list[str]]:
    """Texts full of beginnings of the stop strings: that is where a matcher goes wrong."""
    stops = draw(stop_lists)
    beginnings = [stop[:length] for stop in stops for length in range(1, len(stop))]
    parts = st.sampled_from([*beginnings, "a", "b"])
    return "".join(draw(st.lists(parts, max_size=12))), stops


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """The plain model: the first end of a stop string, and the longest of those that end there."""
    for end in range(1, len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, found))], True
    return text, False


def split(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(min(edge, len(text)) for edge in cuts), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


@settings(max_examples=cases(250, exploring=5000))
@given(case=texts_and_stops(), cuts=st.lists(st.integers(0, 40), max_size=6))
def test_any_cutting_into_pushes_gives_the_plain_models_text(case: tuple[str, list[str]], cuts: list[int]) -> None:
    text, stops = case
    expected, expected_stop = cut(text, stops)
    stop_strings = StopStrings(stops)
    shown = ""
    for part in split(text, cuts):
        emitted, _ = stop_strings.push(part)
        shown += emitted
        assert expected.startswith(shown)
    shown += stop_strings.flush()
    assert (shown, stop_strings.hit is not None) == (expected, expected_stop)


@given(case=texts_and_stops())
def test_only_what_may_become_a_stop_string_is_held(case: tuple[str, list[str]]) -> None:
    text, stops = case
    expected, stopped = cut(text, stops)
    if stopped:
        return
    shown, _ = StopStrings(stops).push(text)
    held = expected[len(shown) :]
    assert held == "" or any(stop.startswith(held) for stop in stops)
    longer = expected[max(0, len(shown) - 1) :] if shown else None
    assert longer is None or not any(len(stop) > len(longer) and stop.startswith(longer) for stop in stops)


def test_a_stop_string_over_three_tokens_never_shows() -> None:
    stop_strings = StopStrings(["\n\nUser:"])
    assert stop_strings.push("Fine.\n") == ("Fine.", False)
    assert stop_strings.push("\nUs") == ("", False)
    assert stop_strings.push("er: and more") == ("", True)
    assert stop_strings.push("ignored") == ("", True)
    assert stop_strings.flush() == ""


def test_a_beginning_that_comes_to_nothing_is_given_back() -> None:
    stop_strings = StopStrings(["STOP"])
    assert stop_strings.push("no ST") == ("no ", False)
    assert stop_strings.push("ART") == ("START", False)
    assert stop_strings.push("ST") == ("", False)
    assert stop_strings.flush() == "ST"


def test_of_those_complete_at_the_same_character_the_longest_wins() -> None:
    assert StopStrings(["END", "THE END"]).push("It is THE END.") == ("It is ", True)


def test_the_first_to_be_complete_wins() -> None:
    assert StopStrings(["abcde", "cd"]).push("xabcdef") == ("xab", True)


def test_without_stop_strings_everything_passes() -> None:
    assert StopStrings([]).push("all of it") == ("all of it", False)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(PromptError, match="empty") as caught:
        StopStrings(["a", ""])
    assert caught.value.param == "stop"


def test_long_repetitive_stop_strings_cost_no_more() -> None:
    """A quadratic matcher would take hours over this."""
    stop_strings = StopStrings(["a" * 50_000 + "b"])
    shown, stopped = stop_strings.push("a" * 200_000)
    assert (len(shown), stopped) == (150_000, False)


def test_the_choices_of_a_request_share_what_is_made_of_its_stop_strings() -> None:
    stops = [f"{number} stop here" for number in range(16)]
    _failure_table.cache_clear()
    for _ in range(32):
        StopStrings(stops)
    assert _failure_table.cache_info().misses == 16
