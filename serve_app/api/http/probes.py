"""`/health` and `/ready`: is the process alive, and can it serve? Knows the model only by its card."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serve_app.core import LoadStage, ModelCard

_READY_RETRY_AFTER_S = "2"


class Probes:
    """What machines ask: is the process alive, can it serve."""

    def __init__(
        self,
        state: Callable[[], Awaitable[ModelCard | LoadStage]],
        generation: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """`generation`: the sampling parameters of requests that don't give them."""
        self._state = state
        self._generation = dict(generation)

    def routes(self) -> list[Route]:
        """Where they are."""
        return [Route("/health", self.health), Route("/ready", self.ready)]

    async def health(self, request: Request) -> Response:
        """200: this process answers. It says nothing of a model."""
        return _json({"status": "ok"}, 200)

    async def ready(self, request: Request) -> Response:
        """200 with the model's card and sampling defaults when it can serve; 503 with the stage and how far before."""
        state = await self._state()
        if isinstance(state, ModelCard):
            card = msgspec.to_builtins(state)
            return _json({"status": "ready", "model": card, "generation": self._generation}, 200)
        document = {"status": "failed" if state.error else "loading", **msgspec.to_builtins(state)}
        return _json(document, 503, {"retry-after": _READY_RETRY_AFTER_S})


def _json(document: dict[str, object], status: int, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(document), status, headers, media_type="application/json")
