"""Can the model serve now, and if not, why: one answer from the progress board and Serve's own replica states.

Never waits for a replica: a call to a deployment without one would wait for ever. Knows nothing of requests.
"""

from __future__ import annotations

import asyncio
import time

from ray import serve
from ray.serve.schema import DeploymentStatusOverview

from serve_app.core import LoadStage, ModelCard
from serve_app.deployments.dispatch.directory import replica_directory
from serve_app.deployments.status.progress import ProgressBoard

READY_FOR_S = 2.0
"""Age at which an answer "ready" is refreshed, while the request that asked goes on. `serve.status()` costs about 18 ms
of CPU on the 2-core machine, taken from that request's prefill: too much for each request."""
READY_AT_MOST_S = 8.0
"""Age at which an answer "ready" is no longer given: the caller waits for a new one. Most probes come less often than
this, so they get a new answer."""
KNOWN_FOR_S = 60.0
"""Replaces READY_FOR_S and READY_AT_MOST_S while this process's router knows replicas with the answer's weights."""
LOADING_FOR_S = 0.5
"""Age up to which an answer "loading" is given again; short, since people watch it."""
_ANSWERING = ("RUNNING", "PENDING_MIGRATION")
"""States of replicas that take requests; in the second one on a node that is being drained, until another is up."""
_NO_PLACE = "to be scheduled"
_FAILED_ONCE = "failed to start"
"""Parts of Serve's messages: `_NO_PLACE` while no node has room for a replica, `_FAILED_ONCE` after a failed start."""


def judge(
    deployment: DeploymentStatusOverview | None, card: ModelCard | None, stage: LoadStage | None, *, may_sleep: bool
) -> ModelCard | LoadStage:
    """What to tell a client, from what Serve says of the model server, its latest card and its latest stage.

    `may_sleep`: the deployment may scale to no replica, so that having none is fine once the model has been loaded.
    """
    if card is not None and answers(deployment):
        return card
    # Serve replaces a replica that died, also in an update, but calls the deployment failed or unhealthy meanwhile.
    died = deployment is not None and deployment.status_trigger == "HEALTH_CHECK_FAILED"
    if deployment is not None and deployment.status == "DEPLOY_FAILED" and not died:
        return LoadStage("failed", error=stage.error if stage and stage.error else _last_line(deployment.message))
    if card is not None and may_sleep:
        return card  # also while a replica starts: the requests that caused it wait for it
    if stage is not None:
        return stage
    otherwise = "starting a model replica" if card is None else "waiting for a model replica that takes requests"
    return LoadStage(_stage_by_serve(deployment.message if deployment is not None and not died else "") or otherwise)


def _stage_by_serve(message: str) -> str | None:
    """The stage that Serve's message gives, for when no replica has reported one since the model was last loaded.

    Most of Serve's messages are remarks for operators and no stage: that a start is slow, or that the number of
    replicas has changed. Two of them say what a start waits for.
    """
    if _FAILED_ONCE in message:
        return f"starting a model replica again ({_last_line(message)})"
    if _NO_PLACE in message:
        return f"waiting for a place in the cluster ({_last_line(message)})"
    return None


def deployment_status(app_name: str, deployment: str) -> DeploymentStatusOverview | None:
    """What Serve says of a deployment; None while it knows none of this name. Blocks for a round trip."""
    application = serve.status().applications.get(app_name)
    return application.deployments.get(deployment) if application else None


def answers(deployment: DeploymentStatusOverview | None) -> bool:
    """Whether any replica of this deployment takes requests."""
    states = deployment.replica_states.items() if deployment is not None else ()
    return any(state in _ANSWERING and count > 0 for state, count in states)


def _last_line(message: str) -> str:
    """The last line of Serve's message: a traceback's exception, or the sentence itself."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[-1] if lines else "the model replica failed to start; its log says why"


class Readiness:
    """The current answer for one model server, asked for when needed and kept for a moment."""

    def __init__(self, board: ProgressBoard, app_name: str, deployment_name: str, *, may_sleep: bool) -> None:
        self._board = board
        self._app_name = app_name
        self._deployment_name = deployment_name
        self._may_sleep = may_sleep
        self._answer: ModelCard | LoadStage = LoadStage("starting")
        self._directory = replica_directory(app_name, deployment_name)
        self._asked_at = float("-inf")
        self._asking: asyncio.Task[ModelCard | LoadStage] | None = None

    async def model(self) -> ModelCard | LoadStage:
        """The card of a model that can serve, or how far it is. Takes milliseconds, whatever the replicas do."""
        age_s = time.monotonic() - self._asked_at
        ready = isinstance(self._answer, ModelCard)
        known = isinstance(self._answer, ModelCard) and self._answer.fingerprint in self._directory.live.values()
        if age_s < (KNOWN_FOR_S if known else READY_FOR_S if ready else LOADING_FOR_S):
            return self._answer
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask())
        if ready and age_s < READY_AT_MOST_S:
            return self._answer
        # Shielded: other callers may wait for the same answer when this one is cancelled.
        return await asyncio.shield(self._asking)

    def doubt(self) -> None:
        """A replica was lost: ask Serve again at the next call of `model`."""
        self._asked_at = float("-inf")

    async def _ask(self) -> ModelCard | LoadStage:
        self._answer = await asyncio.to_thread(self._look)
        self._asked_at = time.monotonic()
        return self._answer

    def _look(self) -> ModelCard | LoadStage:
        deployment = deployment_status(self._app_name, self._deployment_name)
        return judge(deployment, self._board.card(), self._board.stage(), may_sleep=self._may_sleep)
