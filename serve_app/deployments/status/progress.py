"""How far the model is with loading, and the model's card once it is loaded: one notice board per application.

A replica writes here from its constructor, when Serve can't reach it yet; every ingress replica reads it. The board
holds the last report, not which replicas are alive now: `readiness` joins it with Serve's own replica states.

The board lives in Ray's key-value store (GCS) and not in a named actor. An actor would cost another process, even on a
laptop (80 to 130 MB resident, a second of start-up), would need an owner that outlives failed constructors and
redeploys, and would be left behind by `serve shutdown`. The store's functions are private, but Ray's own libraries have
depended on them for years.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable

import msgspec
from ray import serve

from serve_app.config import AppConfig
from serve_app.core import LoadStage, ModelCard
from serve_app.deployments.ray_internals import delete_note, get_note, put_note

logger = logging.getLogger(__name__)

NOTE_PERIOD_S = 0.25
"""Shortest time between two notes of one stage."""
LOG_PERIOD_S = 5.0
"""Shortest time between two log lines of one stage."""
REFUSED_FOR_S = 120.0
"""How long a refusal holds for later tries at most: repeated deploys by `serve.run` all have the same time in Serve."""


class ProgressBoard:
    """The notes of one application. Each call blocks for one short round trip to the GCS, or for a few.

    The notes of another configuration of the same application are never read, because the keys hold a digest of the
    configuration. Only `is_update` tells whether there was another one.
    """

    def __init__(self, app_name: str, config: AppConfig) -> None:
        digest = hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:16]
        self._app_name = app_name
        self._digest = digest.encode()
        self._served_key = f"{app_name}/served"
        self._stage_key = f"{app_name}/{digest}/stage"
        self._card_key = f"{app_name}/{digest}/card"
        self._refused_key = f"{app_name}/{digest}/refused"
        self._commit_key = f"{app_name}/{digest}/commit"

    def report(self, stage: LoadStage) -> None:
        """Note how far a replica is, or why it failed for good."""
        put_note(self._stage_key, msgspec.json.encode(stage))

    def publish(self, card: ModelCard) -> None:
        """Note that a replica has loaded this model; takes the note of its stages away."""
        put_note(self._card_key, msgspec.json.encode(card))
        put_note(self._served_key, self._digest)
        delete_note(self._stage_key)

    def refuse(self, error: str, deployed_at: float | None) -> None:
        """Note that this model can't be served, and why. Only for a cause that another try would find again.

        `deployed_at`: the result of `deployed_at()` from before the model was examined.
        """
        self.report(LoadStage("failed", error=error))
        note = json.dumps({"error": error, "deployed": deployed_at, "at": time.time()})
        put_note(self._refused_key, note)

    def refusal(self) -> str | None:
        """Why a replica of this very deploy has refused a model that was never served; None when none has.

        Serve starts a replica several times before it gives up, and can't be told that a missing model file will still
        be missing in a second. After another deploy the model is examined again.
        """
        note = get_note(self._refused_key)
        if not note or self.card() is not None:
            return None
        refused = json.loads(note)
        deployed = refused.get("deployed")
        if deployed is None or time.time() - refused.get("at", 0.0) > REFUSED_FOR_S:
            return None
        return str(refused["error"]) if deployed == self.deployed_at() else None

    def settle_commit(self, name: str, found: str, serves: Callable[[], bool]) -> str:
        """The commit that all processes of this deploy take for `name`: the one already settled, else `found`.

        `serves` says whether the model answers now. If a model is deployed again while it serves, processes that start
        later keep the commit that serves. Otherwise a new deploy settles the commit anew. If several processes do so at
        once, the first one's commit holds.
        """
        latest_key = f"{self._commit_key}/{name}"
        deployed = self.deployed_at()
        note = get_note(latest_key)
        latest = json.loads(note) if note else None
        if latest and (deployed in (None, latest["deployed"]) or (not self.is_update() and serves())):
            return str(latest["commit"])
        first_key = f"{latest_key}/{deployed}"
        put_note(first_key, found, overwrite=False)
        commit = (get_note(first_key) or found.encode()).decode()
        put_note(latest_key, json.dumps({"commit": commit, "deployed": deployed}))
        if latest:
            delete_note(f"{latest_key}/{latest['deployed']}")
        return commit

    def deployed_at(self) -> float | None:
        """Serve's time of the application's last deploy, which identifies the deploy; None if Serve does not answer."""
        try:
            application = serve.status().applications[self._app_name]
        except Exception:  # the controller is away: each try then examines the model itself
            logger.exception("when %s was deployed could not be found out", self._app_name)
            return None
        return application.last_deployed_time_s

    def is_update(self) -> bool:
        """Whether the application was last served with another configuration, which this one is to replace."""
        served = get_note(self._served_key)
        return served is not None and served != self._digest

    def stage(self) -> LoadStage | None:
        """The latest stage of a replica that is loading; None if none was reported since the model was last loaded."""
        note = get_note(self._stage_key)
        return msgspec.json.decode(note, type=LoadStage) if note else None

    def card(self) -> ModelCard | None:
        """The card of the model as last loaded; None before the first replica has."""
        note = get_note(self._card_key)
        return msgspec.json.decode(note, type=ModelCard) if note else None


class Reporter:
    """Passes stages on to `note` and to the log, both at a limited rate. Called from one thread."""

    def __init__(self, note: Callable[[LoadStage], None]) -> None:
        self._note = note
        self._stage = ""
        self._noted_at = self._logged_at = float("-inf")

    def __call__(self, stage: LoadStage) -> None:
        """Report `stage`: at once when it is a new one, else now and then."""
        now = time.monotonic()
        new = stage.stage != self._stage
        if new or now - self._noted_at >= NOTE_PERIOD_S:
            self._note(stage)
            self._noted_at = now
        if new or now - self._logged_at >= LOG_PERIOD_S:
            logger.info("%s%s", stage.stage, "" if stage.fraction is None else f", {stage.fraction:.0%}")
            self._logged_at = now
        self._stage = stage.stage
