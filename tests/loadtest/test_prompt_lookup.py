"""The measurement of prompt lookup: turns are taken fairly, and a difference in tokens is seen."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_models import CONTEXT, FINGERPRINT, tiny_model

from loadtest import prompt_lookup
from loadtest.prompt_lookup import measure, run, table
from serve_app.config import EngineConfig
from serve_app.engine.engine import Engine


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_lookup, "prompts_for", lambda work, folder, count: [[1, 2, 3]] * count)
    monkeypatch.setattr(prompt_lookup, "ensure_demo_model", lambda folder, progress: folder)


def outcome(seconds: float, output: str = "same") -> dict[str, Any]:
    return {"seconds": seconds, "output": output, "steps": 50, "drafted": 40, "accepted": 30}


def test_turns_are_taken_and_ratios_are_with_over_without() -> None:
    turns: list[bool] = []

    def run(work: dict[str, Any], guessing: bool) -> dict[str, Any]:
        turns.append(guessing)
        return outcome(2.0 if guessing else 4.0)

    rows = measure(run, 2, 100, ["chat"])
    assert turns == [False, True] * 2 + [True, False] * 2 + [False, True] * 2
    assert [(row["streams"], row["ratio"], row["same"]) for row in rows] == [(1, 2.0, True), (8, 2.0, True)]
    assert "| chat | 8 | 2.00 | 2.00 to 2.00 | 200 | 16.0 | 40 | 75% | yes |" in table(rows)


def test_other_tokens_are_seen() -> None:
    rows = measure(lambda work, guessing: outcome(1.0, str(guessing)), 1, 100, ["chat"])
    assert not any(row["same"] for row in rows)
    assert "| NO |" in table(rows)


def test_predicted_work_comes_with_nearly_its_answer() -> None:
    asked: list[tuple[bool, list[tuple[int, ...]] | None]] = []

    def run(work: dict[str, Any], guessing: bool) -> dict[str, Any]:
        asked.append((guessing, work.get("predicted")))
        return outcome(1.0) | {"output": [[7] * 20] * len(work["prompts"])}

    (row, _) = measure(run, 1, 100, ["chat, predicted"])
    assert row["same"]
    nearly = (*[7] * 15, 0, *[7] * 4)
    with_it = [[(False, None), (True, [nearly] * streams), (False, [nearly] * streams)] for streams in (1, 8)]
    assert asked[4:] == [*with_it[0], *with_it[1]]


async def test_a_run_of_an_engine_says_what_it_made() -> None:
    engine = Engine(
        tiny_model("gemma2"),
        EngineConfig(kv_cache_memory=2**24, threads=1),
        context_tokens=CONTEXT,
        fingerprint=FINGERPRINT,
    )
    work = {"prompts": [[1, 2, 3], [4, 5]], "new_tokens": 40, "temperature": 0.0}
    guessing, without = [await run(engine, FINGERPRINT, work, lookup) for lookup in (True, False)]
    predicted = await run(engine, FINGERPRINT, work | {"predicted": without["output"]}, True)
    engine.stop()
    assert predicted["output"] == without["output"]
    assert predicted["steps"] < guessing["steps"]
    assert guessing["output"] == without["output"]
    assert 0 < guessing["accepted"] <= guessing["drafted"]
    assert without["drafted"] == without["accepted"] == 0
    assert guessing["steps"] < without["steps"]
    assert min(guessing["seconds"], without["seconds"]) > 0
