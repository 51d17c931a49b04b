"""What a run with a greedy tenant makes of what the modest one saw."""

from __future__ import annotations

from loadtest.fairness import ratio
from loadtest.overload import Outcome, summary


def test_the_ratio_is_that_of_the_slowest_first_tokens() -> None:
    alone = summary([Outcome(200, first_s=0.2, ended_s=1.0, finished=True)], 1.0)
    beside = summary([Outcome(200, first_s=first_s, ended_s=1.0, finished=True) for first_s in (0.1, 0.5)], 1.0)
    assert ratio({"alone": alone, "beside": beside}, "first_token_s") == 2.5


def test_a_tenant_that_got_nothing_has_no_ratio() -> None:
    alone = summary([Outcome(200, first_s=0.2, ended_s=1.0, finished=True)], 1.0)
    refused = summary([Outcome(503, ended_s=0.1)], 1.0)
    assert ratio({"alone": alone, "beside": refused}, "first_token_s") is None
