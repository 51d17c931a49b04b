"""Refusals of a model: for whom they count, and for how long."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from fake_key_value_store import FakeKeyValueStore
from fake_replica import card

from serve_app.config import AppConfig
from serve_app.deployments.status import progress
from serve_app.deployments.status.progress import REFUSED_FOR_S, ProgressBoard

APP, WHY = "progress-app", "there are no weights"
OTHER = AppConfig.model_validate({"engine": {"max_running": 3}})


class Serve:
    """Knows when an application was deployed, unless its controller is away."""

    def __init__(self) -> None:
        self.deployed: dict[str, float] = {APP: 1000.5, "another": 1000.5}
        self.away = False

    def status(self) -> SimpleNamespace:
        if self.away:
            raise RuntimeError("the controller is away")
        applications = {name: SimpleNamespace(last_deployed_time_s=at) for name, at in self.deployed.items()}
        return SimpleNamespace(applications=applications)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> FakeKeyValueStore:
    return FakeKeyValueStore().used_by(progress, monkeypatch)


@pytest.fixture(autouse=True)
def fake_serve(store: FakeKeyValueStore, monkeypatch: pytest.MonkeyPatch) -> Serve:
    fake = Serve()
    monkeypatch.setattr(progress, "serve", fake)
    return fake


def test_a_refusal_answers_for_the_other_tries_of_its_deploy_and_no_more(fake_serve: Serve) -> None:
    board = ProgressBoard(APP, AppConfig())
    assert board.refusal() is None
    board.refuse(WHY, board.deployed_at())
    stage = board.stage()
    assert stage is not None
    assert (stage.stage, stage.error) == ("failed", WHY)
    assert board.refusal() == WHY
    assert board.refusal() == WHY
    fake_serve.deployed[APP] += 2
    assert board.refusal() is None, "who deploys again has mended it"


def test_a_refusal_is_not_believed_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deploys by `serve.run` from a program all have the time of the first."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "time", lambda: now[0])
    board = ProgressBoard(APP, AppConfig())
    board.refuse(WHY, board.deployed_at())
    now[0] += REFUSED_FOR_S - 1
    assert board.refusal() == WHY
    now[0] += 2
    assert board.refusal() is None


@pytest.mark.parametrize("when", ["refused", "asked", "always"])
def test_while_serve_does_not_say_which_deploy_it_is_each_try_finds_out_for_itself(
    fake_serve: Serve, when: str
) -> None:
    board = ProgressBoard(APP, AppConfig())
    fake_serve.away = when in ("refused", "always")
    board.refuse(WHY, board.deployed_at())
    stage = board.stage()
    assert stage is not None
    assert stage.error == WHY
    fake_serve.away = when in ("asked", "always")
    assert board.refusal() is None


def test_a_refusal_is_of_one_config_of_one_application() -> None:
    board = ProgressBoard(APP, AppConfig())
    board.refuse(WHY, board.deployed_at())
    assert ProgressBoard(APP, OTHER).refusal() is None
    assert ProgressBoard("another", AppConfig()).refusal() is None


def test_a_model_that_was_served_is_tried_again() -> None:
    """What hinders it may pass: the memory of a replica that was killed, say, is not free yet."""
    board = ProgressBoard(APP, AppConfig())
    board.publish(card())
    board.refuse(WHY, board.deployed_at())
    assert board.refusal() is None


def test_what_was_found_out_before_the_latest_deploy_says_nothing_of_it(fake_serve: Serve) -> None:
    board = ProgressBoard(APP, AppConfig())
    when_it_was_looked_at = board.deployed_at()
    fake_serve.deployed[APP] += 2  # somebody mends the folder and deploys again, while the try goes on
    board.refuse(WHY, when_it_was_looked_at)
    assert board.refusal() is None


@pytest.mark.parametrize("note", ['{"error": "x"}', '{"error": "x", "at": 1.0}', '{"error": "x", "deployed": 1000.5}'])
def test_a_note_of_an_older_version_is_no_refusal(store: FakeKeyValueStore, note: str) -> None:
    board = ProgressBoard(APP, AppConfig())
    store.put(board._refused_key, note)
    assert board.refusal() is None
