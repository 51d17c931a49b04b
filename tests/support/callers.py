"""Ways to get the events of one answer: over HTTP and over gRPC, at once or with a break, from one ingress or two."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import grpc
from asgi_driver import Exchange
from protocols import RESUME, Event, Grpc, Json, Protocol, Question
from starlette.applications import Starlette

from serve_app.api.grpc.services import STREAM
from serve_app.proto.serve_app_pb2 import ModelOutputDocument, PromptDocument


class HttpCaller:
    """A client of one ingress."""

    def __init__(self, app: Starlette) -> None:
        self._app = app

    async def whole(self, protocol: Protocol, question: Question) -> Json:
        """An answer as one document."""
        exchange = await self._ended(Exchange(self._app, "POST", protocol.path, protocol.body(question)))
        document: Json = json.loads(exchange.body)
        return document

    async def events(self, protocol: Protocol, question: Question, *, resumable: bool = False) -> list[Event]:
        """A stream to its end."""
        body, headers = protocol.stream_request(question, resumable=resumable)
        return events_of((await self._ended(Exchange(self._app, "POST", protocol.path, body, headers))).body)

    async def beginning(self, protocol: Protocol, question: Question, events: int) -> list[Event]:
        """At least so many events of a resumable stream, unless it has fewer. Then the client goes."""
        exchange = Exchange(self._app, "POST", protocol.path, *protocol.stream_request(question, resumable=True))
        async with exchange.changed:
            await exchange.changed.wait_for(lambda: _complete(exchange) or exchange.body.count(b"\n\n") >= events)
        assert exchange.status == 200, exchange.body
        exchange.disconnect()
        await exchange.end()
        return events_of(exchange.body)

    async def rest(self, protocol: Protocol, question: Question, seen: Sequence[Event]) -> list[Event]:
        """The events of a resumable stream after those that were seen."""
        path, headers = protocol.continuation(seen)
        return events_of((await self._ended(Exchange(self._app, "GET", path, headers=headers))).body)

    async def document(self, path: str) -> Json:
        """What a GET answers."""
        document: Json = json.loads((await self._ended(Exchange(self._app, "GET", path))).body)
        return document

    async def _ended(self, exchange: Exchange) -> Exchange:
        await exchange.end()
        assert exchange.status in (200, 204), exchange.body
        assert _complete(exchange)
        return exchange


def _complete(exchange: Exchange) -> bool:
    """Whether the whole body was sent."""
    return len(exchange.sent) > 1 and not exchange.sent[-1].get("more_body", False)


class GrpcCaller:
    """A client of one ingress over gRPC."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel

    def _call(self, message: PromptDocument, metadata: dict[str, str]) -> Any:
        call = self._channel.unary_stream(STREAM, response_deserializer=ModelOutputDocument.FromString)
        return call(message.SerializeToString(), metadata=tuple(metadata.items()), timeout=60)

    async def events(self, protocol: Grpc, question: Question, *, resumable: bool = False) -> list[Event]:
        """A stream to its end."""
        return await _messages(self._call(protocol.message(question), RESUME if resumable else {}))

    async def beginning(self, protocol: Grpc, question: Question, events: int) -> list[Event]:
        """So many events of a resumable stream, unless it has fewer. Then the client goes."""
        call = self._call(protocol.message(question), RESUME)
        seen = await _messages(call, events)
        call.cancel()
        return seen

    async def rest(self, protocol: Grpc, question: Question, seen: Sequence[Event]) -> list[Event]:
        """The events of a resumable stream after those that were seen."""
        return await _messages(self._call(protocol.message(question), {**RESUME, "last-event-id": seen[-1].id}))


async def _messages(call: Any, most: int | None = None) -> list[Event]:
    """The messages as events, without those that only show that the connection lives."""
    seen: list[Event] = []
    async for message in call:
        if message.HasField("done") or message.HasField("token_id"):
            name, event_id = "done" if message.HasField("done") else "message", message.event_id
            seen.append(Event(event_id, name, message.SerializeToString()))
            if len(seen) == most:
                break
    return seen


def events_of(body: bytes) -> list[Event]:
    """The server-sent events of a body, without comments."""
    return [_event(block.split("\n")) for block in body.decode().replace(": ping\n", "").split("\n\n")[:-1]]


def _event(lines: Sequence[str]) -> Event:
    fields = dict(line.split(": ", 1) for line in lines)
    return Event(fields.get("id", ""), fields.get("event", "message"), fields["data"].encode())
