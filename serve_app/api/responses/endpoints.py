"""The endpoints under /v1/responses.

Knows no event and no store: `answers` and `kept` do.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

from starlette.responses import Response
from starlette.routing import Route

from serve_app.api.errors import bad_request
from serve_app.api.http.endpoint import Call, Counted
from serve_app.api.http.sse import EventStream
from serve_app.api.rate_limits import reserve
from serve_app.api.respond import Responder
from serve_app.api.responses.answers import KeptAnswers, json_response
from serve_app.api.responses.compaction import Compactor
from serve_app.api.responses.conversation import ConversationReader
from serve_app.api.responses.fields import ConversationFields, read_request
from serve_app.api.responses.format import ResponsesFormat
from serve_app.api.responses.ids import new_response_id, stream_id_of
from serve_app.api.responses.kept import KeptResponses, store_errors
from serve_app.generation.service import CompletionService

_RESPONSE = "/v1/responses/{response_id}"

_BOOLEANS = {"true": True, "1": True, "false": False, "0": False, "": False}
_MAX_DIGITS = 9


class Responses:
    """The handlers. Each raises `RequestError`."""

    def __init__(
        self,
        service: CompletionService,
        wire: ResponsesFormat,
        reader: ConversationReader,
        kept: KeptResponses,
        answers: KeptAnswers,
        responder: Responder,
    ) -> None:
        self._service = service
        self._format = wire
        self._reader = reader
        self._kept = kept
        self._answers = answers
        self._responder = responder
        self._compactor = Compactor(service, reader, responder)

    def routes(self, endpoint: Callable[..., Route]) -> list[Route]:
        """A route for each path. `endpoint` makes one of a path, a handler and the methods."""
        return [
            endpoint("/v1/responses", self.create, "POST", counted=Counted.GENERATION),
            endpoint("/v1/responses/compact", self.compact, "POST", counted=Counted.GENERATION),
            endpoint("/v1/responses/input_tokens", self.count, "POST"),
            endpoint(_RESPONSE, self.one, "DELETE", "GET", counted=Counted.NOTHING),
            endpoint(f"{_RESPONSE}/cancel", self.cancel, "POST", reads_body=False, counted=Counted.NOTHING),
            endpoint(f"{_RESPONSE}/input_items", self.input_items, "GET"),
        ]

    async def create(self, call: Call) -> Response | EventStream:
        """`POST /v1/responses`. A stream of a response that is not kept can be resumed as those of other endpoints."""
        if (rest := await self._responder.continued(call)) is not None:
            return rest
        parsed = await self._responder.accept(call, await self._format.parse(call))
        await reserve(call, parsed.resolved)
        if not parsed.settings["response"]["store"]:
            return await self._responder.begin(self._format, call, parsed)
        return await self._answers.begin(call, parsed, streams=bool((call.body or {}).get("stream")))

    async def one(self, call: Call) -> Response | EventStream:
        """`/v1/responses/{response_id}`, by its method."""
        return await (self.delete if call.method == "DELETE" else self.retrieve)(call)

    async def retrieve(self, call: Call) -> Response | EventStream:
        """`GET /v1/responses/{response_id}`, also with `stream=true`."""
        response_id = call.path_params["response_id"]
        self._judge_query(call, "stream", "starting_after")
        if _boolean(call, "stream"):
            after = _number(call, "starting_after", -1)
            return await self._answers.events(call, response_id, after + 1)
        return json_response(await self._kept.document(await self._kept.taken_over(call, response_id)))

    async def cancel(self, call: Call) -> Response:
        """`POST /v1/responses/{response_id}/cancel`."""
        response_id = call.path_params["response_id"]
        stored = await self._kept.stored(call, response_id, 0.0)
        if not stored.document.background:
            message = "Only a background response can be cancelled; close the connection of any other one."
            raise bad_request(message, code="invalid_value")
        if not stored.finished:
            await self._kept.cancel(call, response_id)
            stored = await self._kept.stored(call, response_id)
        return json_response(await self._kept.document(stored))

    async def delete(self, call: Call) -> Response:
        """`DELETE /v1/responses/{response_id}`, also of one that is generated."""
        response_id = call.path_params["response_id"]
        await self._kept.stored(call, response_id, 0.0)
        with store_errors(response_id):
            await self._kept.streams.erase(stream_id_of(response_id) or "")
        return _json_response({"id": response_id, "object": "response", "deleted": True})

    async def input_items(self, call: Call) -> Response:
        """`GET /v1/responses/{response_id}/input_items`: all that the model read, earlier responses included."""
        self._judge_query(call, "limit", "order", "after")
        limit = _number(call, "limit", 20)
        order = call.query.get("order", "desc")
        if not 1 <= limit <= 100:
            raise bad_request("limit must be 1 to 100.", param="limit", code="invalid_value")
        if order not in ("asc", "desc"):
            raise bad_request("order must be asc or desc.", param="order", code="invalid_value")
        stored = await self._kept.stored(call, call.path_params["response_id"], 0.0)
        items: list[dict[str, Any]] = stored.document.settings["input"]
        ordered = items if order == "asc" else items[::-1]
        if (after := call.query.get("after")) is not None:
            index = next((n for n, item in enumerate(ordered) if item["id"] == after), None)
            if index is None:
                raise bad_request("after is not the id of one of these items.", param="after", code="invalid_value")
            ordered = ordered[index + 1 :]
        page = ordered[:limit]
        return _json_response(
            {
                "object": "list",
                "data": page,
                "first_id": page[0]["id"] if page else None,
                "last_id": page[-1]["id"] if page else None,
                "has_more": len(ordered) > limit,
            }
        )

    async def count(self, call: Call) -> Response:
        """`POST /v1/responses/input_tokens`: how many tokens the model would read."""
        unknown = self._format.unknown(call)
        request = await call.run(partial(read_request, ConversationFields, call.body or {}, unknown))
        card = await self._service.ready_model(request.model, call.caller.models)
        options = await call.run(partial(self._reader.options, request, unknown))
        conversation = await self._reader.read(call, request, new_response_id(), unknown)
        truncates = request.truncation == "auto"
        prompt, _ = await self._reader.prompt(call, card, conversation, options, unknown, truncates=truncates)
        return _json_response({"object": "response.input_tokens", "input_tokens": len(prompt.ids)})

    async def compact(self, call: Call) -> Response:
        """`POST /v1/responses/compact`."""
        return _json_response(await self._compactor.compact(call, self._format.unknown(call)))

    def _judge_query(self, call: Call, *known: str) -> None:
        """Report unknown parameters. `include` needs nothing: what a response can have, it has."""
        unknown = self._format.unknown(call)
        for name in dict.fromkeys(call.query.keys()):
            if name not in {*known, "include", "include[]", "include_obfuscation"}:
                unknown.add(name)


def _json_response(document: dict[str, Any]) -> Response:
    return json_response(json.dumps(document, ensure_ascii=False).encode())


def _boolean(call: Call, name: str) -> bool:
    value = _BOOLEANS.get(call.query.get(name, "").lower())
    if value is None:
        raise bad_request(f"{name} must be true or false.", param=name, code="invalid_value")
    return value


def _number(call: Call, name: str, default: int) -> int:
    text = call.query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) <= _MAX_DIGITS):
        raise bad_request(f"{name} must be a number from 0 to 999999999.", param=name, code="invalid_value")
    return int(text)
