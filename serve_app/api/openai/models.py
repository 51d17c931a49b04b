"""GET /v1/models and /v1/models/{model}: what is served, in OpenAI's schema.

Knows no replica: the service does the work.
"""

from __future__ import annotations

import json
import time

from starlette.responses import Response

from serve_app.api.http.endpoint import Call
from serve_app.core import ModelCard
from serve_app.generation.service import CompletionService


class Models:
    """The handlers of /v1/models and /v1/models/{model}."""

    def __init__(self, service: CompletionService) -> None:
        self._service = service
        self._created = int(time.time())

    async def handle_list(self, call: Call) -> Response:
        """The one model, if the caller may use it. Raises `RequestError` (503) while it is not ready."""
        models = [self._document(card) for card in await self._service.ready_models(call.caller.models)]
        return Response(json.dumps({"object": "list", "data": models}), media_type="application/json")

    async def handle_one(self, call: Call) -> Response:
        """The model of this name.

        Raises `RequestError`: 404 for another model, 403 if the caller may not use it, 503 while it is not ready.
        """
        card = await self._service.ready_model(call.path_params["model"], call.caller.models)
        return Response(json.dumps(self._document(card)), media_type="application/json")

    def _document(self, card: ModelCard) -> dict[str, object]:
        return {"id": card.name, "object": "model", "created": self._created, "owned_by": "serve_app"}
