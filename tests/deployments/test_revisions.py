"""Which commit the processes of a deploy take, while the hub's `main` moves."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_key_value_store import FakeKeyValueStore
from fake_replica import card

from serve_app.config import AppConfig, ModelConfig
from serve_app.core import LoadStage
from serve_app.deployments.revisions import settled
from serve_app.deployments.status import progress, readiness
from serve_app.deployments.status.progress import ProgressBoard
from serve_app.models import hub

APP, FIRST, SECOND, THIRD = "revisions-app", "1" * 40, "2" * 40, "3" * 40
CONFIG = AppConfig.model_validate({"model": {"source": "team/model", "tokenizer": "team/words"}})


class Cluster:
    """The hub's branches and Serve's status, as these processes see them."""

    def __init__(self) -> None:
        self.main = {"team/model": FIRST, "team/words": FIRST}
        self.asked: list[ModelConfig] = []
        self.deployed, self.running = 1000.5, 0

    def fetch(self, model: ModelConfig, *, tokenizer_only: bool, progress: Any) -> tuple[Path, str]:
        assert tokenizer_only
        self.asked.append(model)
        return Path("cache"), self.main[model.source]

    def status(self) -> SimpleNamespace:
        model = SimpleNamespace(replica_states={"RUNNING": self.running})
        application = SimpleNamespace(last_deployed_time_s=self.deployed, deployments={"ModelServer": model})
        return SimpleNamespace(applications={APP: application})

    def start(self, config: AppConfig = CONFIG) -> ModelConfig:
        """One process of the deploy."""
        return settled(config, ProgressBoard(APP, config), APP, "ModelServer", ignore).model


def ignore(_: LoadStage) -> None:
    """No one looks."""


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    FakeKeyValueStore().used_by(progress, monkeypatch)
    cluster = Cluster()
    for module in (progress, readiness):
        monkeypatch.setattr(module, "serve", cluster)
    monkeypatch.setattr(hub, "fetch", cluster.fetch)
    return cluster


def test_all_processes_of_a_deploy_take_the_commit_of_the_first(cluster: Cluster) -> None:
    first = cluster.start()
    assert (first.revision, first.tokenizer_revision) == (FIRST, FIRST)
    cluster.main = {"team/model": SECOND, "team/words": THIRD}
    assert cluster.start() == first
    cluster.running = 1
    assert cluster.start() == first, "an ingress that is restarted later"


def test_a_new_deploy_takes_the_hubs_commit_unless_the_model_serves(cluster: Cluster) -> None:
    board = ProgressBoard(APP, CONFIG)
    cluster.start()
    board.publish(card())
    cluster.main = {"team/model": SECOND, "team/words": SECOND}
    cluster.deployed, cluster.running = 2000.5, 1
    assert cluster.start().revision == FIRST, "deployed again without a change: its replicas go on"
    cluster.deployed, cluster.running = 3000.5, 0
    assert cluster.start().revision == SECOND
    cluster.main = {"team/model": THIRD, "team/words": THIRD}
    assert cluster.start().revision == SECOND


def test_an_update_takes_the_hubs_commit_while_the_old_configuration_serves(cluster: Cluster) -> None:
    cluster.start()
    other = CONFIG.model_copy(update={"cache_dir": "elsewhere"})
    ProgressBoard(APP, other).publish(card())
    cluster.main = {"team/model": SECOND, "team/words": SECOND}
    cluster.deployed, cluster.running = 2000.5, 1
    assert cluster.start().revision == SECOND


def test_two_that_settle_at_once_agree(cluster: Cluster) -> None:
    board = ProgressBoard(APP, CONFIG)
    other: list[str] = []

    def meanwhile() -> bool:
        other.append(board.settle_commit("team/model@main", SECOND, lambda: False))
        return False

    board.settle_commit("team/model@main", THIRD, lambda: False)
    cluster.deployed = 2000.5
    board.publish(card())
    assert board.settle_commit("team/model@main", FIRST, meanwhile) == SECOND
    assert other == [SECOND]


def test_a_commit_and_what_is_not_on_the_hub_ask_nobody(cluster: Cluster, tmp_path: Path) -> None:
    for model in ({"source": "team/model", "revision": THIRD}, {"source": str(tmp_path)}, {"source": "demo"}):
        config = AppConfig.model_validate({"model": model})
        assert cluster.start(config) == config.model
    assert cluster.asked == []


def test_a_branch_is_asked_for_by_its_name(cluster: Cluster) -> None:
    config = AppConfig.model_validate({"model": {"source": "team/model", "revision": "v1"}})
    assert cluster.start(config).revision == FIRST
    assert [model.revision for model in cluster.asked] == ["v1"]
