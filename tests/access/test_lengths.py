"""How long answers may be, by the limits of their caller."""

from __future__ import annotations

from typing import Any

import pytest
from fake_replica import generation_request
from limited_callers import caller
from msgspec import structs

from serve_app.access.caller import ANONYMOUS, Limits
from serve_app.access.lengths import NEVER_FITS, fitted, reserved_tokens
from serve_app.core import FailureCode, RequestError, SamplingParams
from serve_app.generation.request import ResolvedRequest


def request(choices: int = 1, *, asked: int | None = None, **changes: Any) -> ResolvedRequest:
    """A prompt of three tokens, with answers of up to 100."""
    each = generation_request(**{"max_new_tokens": 100 if asked is None else asked, **changes})
    requests = tuple(structs.replace(each, choice=number) for number in range(choices))
    return ResolvedRequest("tiny", requests, False, (), choices, asked_tokens=asked)


@pytest.mark.parametrize(
    ("limits", "made", "longest"),
    [
        ({"answer_tokens": 40}, request(), 40),
        ({"answer_tokens": 40}, request(asked=50), 40),
        ({"answer_tokens": 40}, request(asked=30), 30),
        ({"context_tokens": 50}, request(2), 47),
        ({"context_tokens": 3}, request(asked=0), 0),
        ({"tokens_per_minute": 1000}, request(), 100),
        ({"tokens_per_minute": 200}, request(), 50),
        ({"tokens_per_minute": 200}, request(2), 25),
        ({"tokens_per_minute": 200}, request(asked=100), 100),
        ({"tokens_per_day": 103}, request(asked=100), 100),
        ({"tokens_per_minute": 4}, request(), 1),
        ({"tenant": Limits(answer_tokens=20), "answer_tokens": 40}, request(), 20),
        ({"requests_per_minute": 1, "streams": 1}, request(), 100),
    ],
)
def test_answers_are_cut_to_what_may_ever_be(limits: dict[str, Any], made: ResolvedRequest, longest: int) -> None:
    cut = fitted(made, caller(**limits))
    assert {each.max_new_tokens for each in cut.requests} == {longest}
    assert (cut is made) == (longest == made.requests[0].max_new_tokens)
    assert reserved_tokens(cut) == 3 + made.choices * longest


@pytest.mark.parametrize(
    ("limits", "made", "code", "says"),
    [
        ({"context_tokens": 3}, request(), FailureCode.CONTEXT_LENGTH_EXCEEDED, "maximum context length is 3"),
        ({"tokens_per_minute": 3}, request(), NEVER_FITS, "limit of 3 tokens: its prompt has 3.*Shorten the prompt"),
        ({"tokens_per_minute": 102}, request(asked=100), NEVER_FITS, "Lower max_tokens, or shorten"),
        ({"tokens_per_day": 102}, request(asked=100), NEVER_FITS, "limit of 102"),
        ({"answer_tokens": 5}, request(sampling=SamplingParams(seed=7, min_tokens=6)), "invalid_value", "min_tokens"),
    ],
)
def test_what_can_never_be_is_refused_with_what_to_do(
    limits: dict[str, Any], made: ResolvedRequest, code: str, says: str
) -> None:
    with pytest.raises(RequestError, match=says) as refused:
        fitted(made, caller(**limits))
    assert refused.value.code == code


def test_without_limits_a_request_stays_as_it_is() -> None:
    made = request()
    assert fitted(made, ANONYMOUS) is made
