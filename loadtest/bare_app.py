"""The least that Ray Serve can serve with the same replicas as ours: what an idle service costs without our code.

`import_path: loadtest.bare_app:build` in a Serve config of ours, with the same `args`.
"""

# No `from __future__ import annotations`: Serve reads the annotation of `args` to make an AppConfig of the YAML.

from typing import Any

from ray import serve
from starlette.requests import Request

from serve_app.app import replica_options
from serve_app.config import AppConfig


class Ingress:
    """Answers every request with one word, as /ready would."""

    def __init__(self, model_server: Any) -> None:
        self._model_server = model_server

    async def __call__(self, request: Request) -> str:
        return "ready"


class ModelServer:
    """Does nothing."""


def build(args: AppConfig) -> serve.Application:
    """As many replicas of as many deployments, of the same names; Serve's own defaults for the rest."""
    model_server = serve.deployment(name="ModelServer", **replica_options(args.model_server))(ModelServer)
    ingress = serve.deployment(name="Ingress", **replica_options(args.ingress))(Ingress)
    return ingress.bind(model_server.bind())
