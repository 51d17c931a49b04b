"""What clients are told, from what Serve and the board say."""

from __future__ import annotations

import inspect

import pytest
from fake_model_server import CARD
from ray.serve._private import deployment_state
from ray.serve.schema import DeploymentStatusOverview

from serve_app.config import AppConfig
from serve_app.core import Fingerprint, LoadStage, ModelCard
from serve_app.deployments.dispatch.directory import replica_directory
from serve_app.deployments.status.progress import ProgressBoard
from serve_app.deployments.status.readiness import Readiness, judge

STARTING = LoadStage("starting a model replica")
ROUTING = LoadStage("waiting for a model replica that takes requests")
LOADING = LoadStage("loading weights", 0.5)
FAILED = LoadStage("failed", error="there is no such model")


def deployment(status: str = "HEALTHY", message: str = "", **replicas: int) -> DeploymentStatusOverview:
    return DeploymentStatusOverview(status, "CONFIG_UPDATE_STARTED", dict(replicas), message)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("overview", "card", "stage", "may_sleep", "answer"),
    [
        (deployment(RUNNING=1), CARD, None, False, CARD),
        (deployment(RUNNING=1, STARTING=1), CARD, LOADING, False, CARD),
        (deployment(PENDING_MIGRATION=1, STARTING=1), CARD, LOADING, False, CARD),
        (deployment(STOPPING=1, STARTING=1), CARD, LOADING, False, LOADING),
        (deployment(STARTING=1), None, LOADING, False, LOADING),
        (deployment(STARTING=1), CARD, LOADING, False, LOADING),
        (deployment("DEPLOY_FAILED"), None, FAILED, False, FAILED),
        (deployment(), CARD, None, True, CARD),
        (deployment("UPSCALING", STARTING=1), CARD, LOADING, True, CARD),
        (deployment(), CARD, None, False, ROUTING),
        (deployment(STARTING=1), CARD, None, False, ROUTING),
        (deployment(STARTING=1), None, None, False, STARTING),
        (None, None, None, False, STARTING),
    ],
)
def test_judge(
    overview: DeploymentStatusOverview | None,
    card: ModelCard | None,
    stage: LoadStage | None,
    may_sleep: bool,
    answer: ModelCard | LoadStage,
) -> None:
    assert judge(overview, card, stage, may_sleep=may_sleep) == answer


@pytest.mark.parametrize("status", ["UNHEALTHY", "DEPLOY_FAILED"])
def test_a_replica_that_died_is_no_failure_of_the_model(status: str) -> None:
    """In an update Serve says DEPLOY_FAILED of it, and goes on."""
    message = "A replica's health check failed. This deployment will be UNHEALTHY until the replica recovers."
    overview = DeploymentStatusOverview(status, "HEALTH_CHECK_FAILED", {}, message)  # type: ignore[arg-type]
    assert judge(overview, CARD, None, may_sleep=False) == ROUTING
    assert judge(overview, CARD, LOADING, may_sleep=False) == LOADING


def test_a_failure_without_a_note_is_told_by_its_last_line() -> None:
    overview = deployment("DEPLOY_FAILED", "Traceback:\n  a line\nMemoryError: no\n")
    assert judge(overview, None, LOADING, may_sleep=False) == LoadStage("failed", error="MemoryError: no")


def test_a_replica_that_has_no_place_says_what_it_waits_for() -> None:
    message = 'It has 1 replicas that have taken more than 30s to be scheduled. Resources required: {"GPU": 1}.'
    overview = deployment("UPDATING", message, STARTING=1)
    assert judge(overview, None, None, may_sleep=False) == LoadStage(f"waiting for a place in the cluster ({message})")


@pytest.mark.parametrize("card", [None, CARD])
@pytest.mark.parametrize(
    "remark",
    [
        "Upscaling from 0 to 1 replicas.",
        "It has 1 replicas that have taken more than 30s to initialize.\nThis may be caused by a slow __init__ or "
        "reconfigure method.",
    ],
)
def test_a_remark_of_serve_is_no_stage(card: ModelCard | None, remark: str) -> None:
    """The replica has a place: it is being made, or has loaded the model and is about to be routed to."""
    answer = judge(deployment("UPDATING", remark, STARTING=1), card, None, may_sleep=False)
    assert answer == (STARTING if card is None else ROUTING)


def test_a_try_that_failed_is_told_while_the_next_one_starts() -> None:
    message = "A replica failed to start with exception. Retrying 2 more time(s). Error:\nTraceback:\nMemoryError: no\n"
    answer = judge(deployment("UPDATING", message, STARTING=1), None, None, may_sleep=False)
    assert answer == LoadStage("starting a model replica again (MemoryError: no)")


def test_the_words_are_serves_own() -> None:
    said = inspect.getsource(deployment_state)
    assert 's to be scheduled. "' in said
    assert 'f"A replica failed to start with exception.' in said


class Looking(Readiness):
    """What it would ask Ray for is given by a test."""

    def __init__(self, answer: ModelCard | LoadStage) -> None:
        super().__init__(ProgressBoard("an app", AppConfig()), "an app", "ModelServer", may_sleep=False)
        self.given = answer
        self.looks = 0

    def _look(self) -> ModelCard | LoadStage:
        self.looks += 1
        return self.given


async def test_while_the_router_knows_replicas_nobody_is_asked() -> None:
    table = replica_directory("an app", "ModelServer")
    readiness = Looking(CARD)
    assert await readiness.model() == CARD
    table.update({"a replica": CARD.fingerprint})
    readiness._asked_at -= 50
    assert await readiness.model() == CARD
    assert readiness.looks == 1
    readiness.given = LOADING
    readiness.doubt()
    assert await readiness.model() == LOADING
    readiness.given = CARD
    readiness._asked_at -= 1
    assert await readiness.model() == CARD
    table.update({"a replica": Fingerprint("of other weights")})
    readiness.given = LOADING
    readiness._asked_at -= 50
    assert await readiness.model() == LOADING
    table.update({})
