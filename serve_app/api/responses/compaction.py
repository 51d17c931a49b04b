"""POST /v1/responses/compact: a long conversation as its user's messages and a summary by the model.

OpenAI's answer is "all user messages, followed by a single compaction item", whose content clients can't read. Ours is
the summary, in base64. Promises that an item of type `compaction` that is sent back reads as that summary.
"""

from __future__ import annotations

import time
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any

from serve_app.api.errors import bad_request
from serve_app.api.http.endpoint import Call
from serve_app.api.rate_limits import reserve
from serve_app.api.respond import Responder
from serve_app.api.responses.conversation import Conversation, ConversationReader
from serve_app.api.responses.fields import ConversationFields, read_request
from serve_app.api.responses.ids import input_item_id, new_response_id, output_item_id
from serve_app.api.responses.items import compaction
from serve_app.api.responses.writer import usage_document
from serve_app.api.unknown_fields import UnknownFields
from serve_app.api.wire import ParsedRequest
from serve_app.chat.options import ToolChoice
from serve_app.chat.parts import TextPart
from serve_app.generation.request import CompletionParams
from serve_app.generation.service import CompletionService

_TASK = (
    "Summarise the conversation so far, so that it can be continued from your summary alone. Keep all facts, names, "
    "numbers, decisions, results of tools and open questions. Write only the summary."
)
MAX_SUMMARY_TOKENS = 2048


class Compactor:
    """Compacts conversations."""

    def __init__(self, service: CompletionService, reader: ConversationReader, responder: Responder) -> None:
        self._responder = responder
        self._service = service
        self._reader = reader

    async def compact(self, call: Call, unknown: UnknownFields) -> dict[str, Any]:
        """OpenAI's CompactedResponse. Raises `RequestError`."""
        request = await call.run(partial(read_request, ConversationFields, call.body or {}, unknown))
        card = await self._service.ready_model(request.model, call.caller.models)
        response_id = new_response_id()
        options = await call.run(partial(self._reader.options, request, unknown))
        options = replace(options, text_grammar="", tool_choice=ToolChoice("none"))
        conversation = await self._reader.read(call, request, response_id, unknown)
        task = {
            "id": input_item_id(response_id, "message", len(conversation.items)),
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": _TASK}],
        }
        asked = Conversation(conversation.instructions, [*conversation.items, task], conversation.earlier)
        prompt, _ = await self._reader.prompt(
            call, card, asked, options, unknown, truncates=request.truncation == "auto"
        )
        params = CompletionParams(temperature=0.0, default_max_tokens=MAX_SUMMARY_TOKENS)
        resolved = self._service.resolve(
            card, [prompt], params, request_id=call.record.request_id, remaining_s=call.remaining_s()
        )
        accepted = await self._responder.accept(call, ParsedRequest(resolved, None))
        await reserve(call, accepted.resolved)
        running = self._service.start(accepted.resolved)
        texts: list[str] = []
        async with running, aclosing(running.deltas()) as deltas:
            async for delta in deltas:
                if delta.token_ids:
                    call.record.saw_tokens(len(delta.token_ids))
                if delta.finish_reason is not None:
                    call.record.outcome = delta.finish_reason
                texts += [part.text for part in delta.parts if isinstance(part, TextPart)]
        summary = "".join(texts).strip()
        if not summary:
            raise bad_request("The model gave no summary of this conversation; send it as it is.", code="empty_summary")
        users = [item for item in conversation.items if item.get("role") == "user"]
        made = compaction(output_item_id(response_id, "compaction", len(users)), summary)
        return {
            "id": response_id,
            "object": "response.compaction",
            "created_at": int(time.time()),
            "output": [*users, made],
            "usage": usage_document(running.usage),
        }
