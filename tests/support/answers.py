"""Answers over HTTP, whole or streamed, in one form, so that an undisturbed one can be compared with any other."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from typing import Any

import httpx

TOKENS = 120
CHAT = "/v1/chat/completions"


def body_of(path: str, fields: Mapping[str, Any], text: str = "Tell me more.") -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": TOKENS, "ignore_eos": True}
    if fields.get("stream"):
        body["stream_options"] = {"include_usage": True}
    if path == "/stream":
        body.pop("ignore_eos")
    else:
        body["model"] = "tiny-chat"
    return body | dict(fields)


class Answer:
    """One answer as it comes, in a form that compares whole ones with streamed ones."""

    def __init__(self) -> None:
        self.status = 0
        self.choices: dict[int, dict[str, Any]] = {}
        self.usage: Any = None
        self.error: Any = None
        self.longest_pause_s = 0.0
        """Between two documents of one choice, or before its first one. Of a whole answer: until it was there."""
        self.heartbeats = 0
        self.request_id = ""
        self.stream_id = ""
        self.flows = asyncio.Event()
        self.over = asyncio.Event()
        self._asked = time.monotonic()
        self._heard: dict[int, float] = {}

    def add(self, document: Mapping[str, Any]) -> None:
        if "error" in document:
            self.error = document["error"]
        self.usage = document.get("usage") or self.usage
        if "generated_text" in document or "finish_reason" in document:
            document = {"choices": [{"index": 0, "delta": {"content": document.get("generated_text")}} | document]}
        for choice in document.get("choices", ()):
            now = time.monotonic()
            pause_s = now - self._heard.get(choice["index"], self._asked)
            self.longest_pause_s = max(self.longest_pause_s, pause_s)
            self._heard[choice["index"]] = now
            known = self.choices.setdefault(choice["index"], {"text": "", "logprobs": [], "finish_reason": None})
            known["text"] += (choice.get("delta") or choice.get("message") or {}).get("content") or ""
            known["logprobs"] += (choice.get("logprobs") or {}).get("content") or []
            known["finish_reason"] = choice.get("finish_reason") or known["finish_reason"]

    async def flowing(self) -> None:
        """Until it has more than ten events. One that ends or breaks before fails the test, with what came."""
        flows, over = (asyncio.ensure_future(event.wait()) for event in (self.flows, self.over))
        try:
            await asyncio.wait({flows, over}, timeout=120, return_when=asyncio.FIRST_COMPLETED)
        finally:
            flows.cancel()
            over.cancel()
        assert self.flows.is_set(), f"no stream: {self.summary()}"

    def summary(self) -> Any:
        usage = {key: self.usage[key] for key in ("prompt_tokens", "completion_tokens")} if self.usage else None
        return self.status, self.choices, usage, self.error


async def post(
    client: httpx.AsyncClient, url: str, body: dict[str, Any], answer: Answer, headers: dict[str, str] | None = None
) -> Answer:
    """Read it into `answer`, and return it."""
    try:
        return await _post(client, url, body, answer, headers)
    finally:
        answer.over.set()


async def _post(
    client: httpx.AsyncClient, url: str, body: dict[str, Any], answer: Answer, headers: dict[str, str] | None
) -> Answer:
    async with client.stream("POST", url, json=body, headers=headers) as response:
        answer.status = response.status_code
        answer.request_id = response.headers.get("x-request-id", "")
        answer.stream_id = response.headers.get("x-stream-id", "")
        if not response.headers["content-type"].startswith("text/event-stream"):
            answer.add(json.loads(await response.aread()))
            return answer
        events = 0
        async for line in response.aiter_lines():
            answer.heartbeats += line == ": ping"
            if line.startswith("data: {"):
                events += 1
                answer.add(json.loads(line[6:]))
                if events > 10:
                    answer.flows.set()
    return answer
