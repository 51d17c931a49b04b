"""`/health` and `/ready`: is the process alive, and can it serve? Knows the model only by its card."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serve_app.api.http.endpoint import CALLER
from serve_app.api.http.guard import Guard
from serve_app.core import LoadStage, ModelCard

_READY_RETRY_AFTER_S = "2"


def probes(
    state: Callable[[], Awaitable[ModelCard | LoadStage]], generation: dict[str, float], guard: Guard
) -> list[Route]:
    """The two routes. `generation`: the sampling parameters of requests that don't give them."""

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

    return [Route("/health", health), Route("/ready", ready)]


def _json(document: dict[str, object], status: int, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(document), status, headers, media_type="application/json")
