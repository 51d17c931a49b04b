"""What the tests of the Responses API share: requests, and the events of a stream, checked against OpenAI's types."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
from openai.types.responses import Response as OpenAIResponse
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from serve_app.resume.context import ResumeSettings

Event = dict[str, Any]

HI: dict[str, Any] = {"input": "Hi", "seed": 7}
BRIEF = ResumeSettings(grace_s=0.0, lease_s=0.2, tick_s=0.01, settle_s=0.5, gone_s=0.1, refusal_s=0.05)
EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


async def until(condition: Callable[[], bool]) -> None:
    """Let the other tasks run until it holds."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - any condition, of things that tell nobody
            await asyncio.sleep(0.001)


def events_of(body: bytes) -> list[Event]:
    """The events of a stream; each is one of OpenAI's, and says its own type."""
    found = []
    for block in body.replace(b": ping\n", b"").decode().split("\n\n")[:-1]:
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        EVENTS.validate_python(event)
        found.append(event)
    return found


def text_of(document: Event) -> str:
    """Of a document that is one of OpenAI's."""
    return OpenAIResponse.model_validate(document, strict=True).output_text


async def create(api: httpx.AsyncClient, **fields: Any) -> Event:
    """A new response."""
    response = await api.post("/v1/responses", json={**HI, **fields})
    assert response.status_code == 200, response.text
    document: Event = response.json()
    return document
