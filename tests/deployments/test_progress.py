"""Refusals of a model: for whom they count, and for how long."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from fake_key_value_store import FakeKeyValueStore
from fake_replica import card

from serve_app.config import AppConfig
from serve_app.deployments import progress
from serve_app.deployments.progress import REFUSED_FOR_S, ProgressBoard

APP, WHY = "progress-app", "there are no weights"
OTHER = AppConfig.model_validate({"engine": {"max_running": 3}})


@pytest.fixture
def sleep(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets simulated seconds pass."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "time", lambda: now[0])

    def passes(seconds: float) -> None:
        now[0] += seconds

    return passes


@pytest.fixture(autouse=True)
def _store(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeKeyValueStore().used_by(progress, monkeypatch)


def test_a_refusal_answers_for_the_next_tries_and_then_no_more(sleep: Callable[[float], None]) -> None:
    board = ProgressBoard(APP, AppConfig())
    assert board.refusal() is None
    board.refuse(WHY)
    stage = board.stage()
    assert stage is not None
    assert (stage.stage, stage.error) == ("failed", WHY)
    sleep(REFUSED_FOR_S - 0.1)
    assert board.refusal() == WHY
    sleep(0.2)
    assert board.refusal() is None, "who deploys again has mended it"


@pytest.mark.usefixtures("sleep")
def test_a_refusal_is_of_one_config_of_one_application() -> None:
    ProgressBoard(APP, AppConfig()).refuse(WHY)
    assert ProgressBoard(APP, OTHER).refusal() is None
    assert ProgressBoard("another", AppConfig()).refusal() is None


@pytest.mark.usefixtures("sleep")
def test_a_model_that_was_served_is_tried_again() -> None:
    """What hinders it may pass: the memory of a replica that was killed, say, is not free yet."""
    board = ProgressBoard(APP, AppConfig())
    board.publish(card())
    board.refuse(WHY)
    assert board.refusal() is None
