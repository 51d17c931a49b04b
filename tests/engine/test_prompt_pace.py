"""How many tokens of prompts a step may have where several tenants ask."""

from __future__ import annotations

import pytest

from serve_app.engine.prompt_pace import LEAST_TOKENS, LONGEST_S, PromptPace


def test_nothing_is_known_until_a_step_had_a_prompt() -> None:
    pace = PromptPace()
    pace.took(0.1, 40, 40)
    pace.took(0.1, LEAST_TOKENS + 9, 10)
    assert pace.most(8) is None


@pytest.mark.parametrize("tokens_per_s", [10.0, 1_000.0, 100_000.0])
def test_prompts_take_as_long_as_the_decodes_or_hardly_any_time(tokens_per_s: float) -> None:
    pace = PromptPace()
    pace.took(512 / tokens_per_s, 512, 12)
    short = int(LONGEST_S * tokens_per_s)
    assert pace.most(0) == pytest.approx(max(LEAST_TOKENS, short), abs=1)
    assert pace.most(100) == pytest.approx(max(100, short), abs=1)


def test_a_slow_first_step_is_forgotten() -> None:
    pace = PromptPace()
    pace.took(60.0, 32, 0)
    for _ in range(80):
        pace.took(0.032, 32, 0)
    assert pace.most(0) == pytest.approx(1000 * LONGEST_S, rel=0.1)


def test_a_step_that_took_no_time_limits_nothing() -> None:
    pace = PromptPace()
    pace.took(0.0, 512, 0)
    assert (pace.most(0) or 0) > 1_000_000
