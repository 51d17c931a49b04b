"""`/health`, `/ready` and `/metrics`: is the process alive, can it serve, and what does the service do?

Knows the model only by its card.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serve_app.api.errors import ApiError
from serve_app.api.http.endpoint import CALLER
from serve_app.api.http.guard import Guard
from serve_app.api.http.routing import route
from serve_app.core import LoadStage, ModelCard
from serve_app.observability.exposition import CONTENT_TYPE

_READY_RETRY_AFTER_S = "2"
MetricsText = Callable[[], Awaitable[bytes]]
"""The metrics of the whole service in Prometheus's text format."""


async def no_metrics() -> bytes:
    """Of a service that has none."""
    return b""


def probes(
    state: Callable[[], Awaitable[ModelCard | LoadStage]],
    generation: dict[str, float],
    guard: Guard,
    metrics: MetricsText,
) -> list[Route]:
    """The three routes. `generation`: the sampling parameters of requests that don't give them."""

    async def health(request: Request) -> Response:
        """200: this process answers. It says nothing of a model."""
        return _json({"status": "ok"}, 200)

    async def ready(request: Request) -> Response:
        """200 with the model's card and sampling defaults once it can serve; before that, 503 with the `LoadStage`."""
        now = await state()
        if isinstance(now, ModelCard):
            model, access = msgspec.to_builtins(now), guard.described(request.scope[CALLER])
            return _json({"status": "ready", "model": model, "generation": generation, "access": access}, 200)
        document = {"status": "failed" if now.error else "loading", **msgspec.to_builtins(now)}
        return _json(document, 503, {"retry-after": _READY_RETRY_AFTER_S})

    async def scrape(request: Request) -> Response:
        """200 with the metrics. They name the tenants, so a caller with a key must be an admin."""
        if guard.keys.required and not request.scope[CALLER].admin:
            message = "This key may not read the metrics; use one that was made with `serve-app keys create --admin`."
            raise ApiError(403, message, code="admin_only")
        return Response(await metrics(), 200, {"content-type": CONTENT_TYPE})

    return [Route("/health", health), Route("/ready", ready), route("/metrics", scrape, "GET", "HEAD")]


def _json(document: dict[str, object], status: int, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(document), status, headers, media_type="application/json")
