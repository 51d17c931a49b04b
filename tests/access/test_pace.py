"""How long a token takes, as ended requests and reports tell it."""

from __future__ import annotations

import pytest

from serve_app.access.pace import SETTLED_S, START_S_PER_TOKEN, Pace
from serve_app.core import ReplicaLoad


def load(running: int, tokens_per_s: float) -> ReplicaLoad:
    return ReplicaLoad(
        running=running,
        waiting=0,
        places=4,
        free_tokens=1000,
        waiting_tokens=0,
        tokens_per_s=tokens_per_s,
        seconds_per_request=0.0,
    )


def test_nothing_known_is_a_hopeful_guess() -> None:
    assert Pace().s_per_token == START_S_PER_TOKEN


def test_what_takes_long_when_the_service_is_full_is_not_forgotten_when_it_is_not() -> None:
    pace = Pace()
    pace.ended(2.0, 100, full=False)
    assert pace.s_per_token == pytest.approx(0.02), "better than a guess"
    pace.ended(10.0, 100, full=True)
    pace.ended(2.0, 100, full=False)
    assert pace.s_per_token == pytest.approx(0.1), "nobody waits when it is not full"


def test_an_answer_without_tokens_tells_nothing() -> None:
    pace = Pace()
    pace.ended(100.0, 0, full=True)
    assert pace.s_per_token == START_S_PER_TOKEN


def test_reports_count_once_their_averages_are_of_a_full_service() -> None:
    pace = Pace()
    pace.reported([load(1, 30.0)], 0.0)
    assert pace.s_per_token == pytest.approx(1 / 30)
    pace.reported([load(4, 30.0), load(4, 30.0)], 1.0)  # four run, and the average is still of one
    assert pace.s_per_token == pytest.approx(1 / 30)
    pace.reported([load(4, 50.0), load(4, 30.0)], 1.0 + SETTLED_S)
    assert pace.s_per_token == pytest.approx(0.1)
    pace.reported([load(0, 0.0)], 10.0)
    assert pace.s_per_token == pytest.approx(0.1)
