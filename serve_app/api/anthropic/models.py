"""GET /v1/models and /v1/models/{model} for Anthropic's clients, which read another schema than OpenAI's.

Knows no replica: the service does the work.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime

from starlette.responses import Response

from serve_app.api.http.endpoint import Call
from serve_app.core import ModelCard
from serve_app.generation.service import CompletionService

_CURSORS = ("after_id", "before_id")


class AnthropicModels:
    """The handlers of /v1/models and /v1/models/{model}."""

    def __init__(self, service: CompletionService) -> None:
        self._service = service
        self._created = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    async def handle_list(self, call: Call) -> Response:
        """The one model, if the caller may use it; nothing on a page before or after it.

        Raises `RequestError` (503) while it is not ready.
        """
        models = [self._document(card) for card in await self._service.ready_models(call.caller.models)]
        data = [] if any(call.query.get(cursor) for cursor in _CURSORS) else models
        ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
        return Response(json.dumps({"data": data, "has_more": False, **ends}), media_type="application/json")

    async def handle_one(self, call: Call) -> Response:
        """The model of this name.

        Raises `RequestError`: 404 for another model, 403 if the caller may not use it, 503 while it is not ready.
        """
        card = await self._service.ready_model(call.path_params["model"], call.caller.models)
        return Response(json.dumps(self._document(card)), media_type="application/json")

    def _document(self, card: ModelCard) -> dict[str, object]:
        return {
            "type": "model",
            "id": card.name,
            "display_name": card.name,
            "created_at": self._created,
            "lifecycle": "active",
            "max_input_tokens": card.context_tokens,
            "max_tokens": card.context_tokens,
        }
