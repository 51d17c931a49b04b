"""POST /v1/chat/completions/render and /v1/completions/render: what a request would become, and nothing generated.

The request is read by the code that reads the real one, so what is shown here is what would be sent to the model.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from msgspec.structs import asdict
from starlette.responses import Response

from serve_app.api.http.endpoint import Call
from serve_app.api.respond import Responder
from serve_app.api.wire import WireFormat
from serve_app.chat.tokenizer import ChatTokenizer
from serve_app.generation.request import ANY_SEED, ResolvedRequest


class Render:
    """The handler of one endpoint."""

    def __init__(self, responder: Responder, wire: WireFormat, tokenizer: ChatTokenizer) -> None:
        """`responder`: that of the real endpoint."""
        self._responder = responder
        self._wire = wire
        self._tokenizer = tokenizer

    async def handle(self, call: Call) -> Response:
        """The ids and the texts of the request's prompts, and how they would be answered. Raises `RequestError`."""
        parsed = await self._responder.accept(call, await self._wire.parse(call))
        seeded = (call.body or {}).get("seed") not in (None, ANY_SEED)
        return await call.run(partial(self._rendered, parsed.resolved, seeded=seeded))

    def _rendered(self, resolved: ResolvedRequest, *, seeded: bool) -> Response:
        """`seeded`: the caller chose the seed; one that was drawn means nothing here."""
        first = resolved.requests[0]
        params: dict[str, Any] = {
            **asdict(first.sampling),
            "logit_bias": {str(token_id): bias for token_id, bias in first.sampling.logit_bias},
            "prompt_logprobs": first.prompt_logprobs,
            "stop": list(resolved.stops),
            "stop_token_ids": list(first.stop_token_ids),
            "n": resolved.choices_per_prompt,
        }
        if not seeded:
            params["seed"] = None
        prompts = [
            {
                "token_ids": list(each.prompt_token_ids),
                "text": self._tokenizer.shown(each.prompt_token_ids),
                "max_tokens": each.max_new_tokens,
                "constraint": each.constraint or None,
            }
            for each in resolved.requests[:: resolved.choices_per_prompt]
        ]
        document = {"model": resolved.model, "prompts": prompts, "sampling_params": params}
        return Response(json.dumps(document, ensure_ascii=False).encode(), media_type="application/json")
