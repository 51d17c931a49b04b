"""Settles once per deploy which commit of a hub model is used. All tokenizers and weights are then of that commit, also
those of replicas that start later.

A branch moves: two processes that each ask the hub for `main` may get two commits. The first process asks the hub and
writes the commit on the application's `ProgressBoard`; all others read it there. `app.build` does not settle it: it
would wait for the network, on a machine that may have neither the hub's token nor its cache. It would also turn a
redeploy that changes only a limit into a new version of every deployment, which restarts all replicas.
"""

from __future__ import annotations

import re

from serve_app.config import AppConfig, ModelConfig
from serve_app.deployments.status.progress import ProgressBoard
from serve_app.deployments.status.readiness import answers, deployment_status
from serve_app.models.cache import Progress
from serve_app.models.source import SourceKind, source_kind

_COMMIT = re.compile(r"[0-9a-f]{40}")


def settled(
    config: AppConfig, board: ProgressBoard, app_name: str, model_deployment: str, progress: Progress
) -> AppConfig:
    """`config` with commits in place of the branches and tags of hub models. Blocks; raises `ModelError`."""

    def commit(model: ModelConfig) -> str | None:
        if source_kind(model.source) is not SourceKind.HUB or _COMMIT.fullmatch(model.revision or ""):
            return model.revision
        from serve_app.models import hub  # seconds of imports that no other source needs

        # Fetched by name even if the commit is known, so that this machine's cache remembers the name's commit.
        _, found = hub.fetch(model, tokenizer_only=True, progress=progress)
        name = f"{model.source}@{model.revision or 'main'}"
        return board.settle_commit(name, found, lambda: answers(deployment_status(app_name, model_deployment)))

    model = config.model
    pins = {"revision": commit(model)}
    if model.tokenizer is not None:
        pins["tokenizer_revision"] = commit(ModelConfig(source=model.tokenizer, revision=model.tokenizer_revision))
    return config.model_copy(update={"model": model.model_copy(update=pins)})
