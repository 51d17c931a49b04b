"""Streams by any protocol, many at once, and when each token came."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import httpx

from loadtest.http_load import StreamTimes, stream_completion, timings
from serve_app.client import grpc_protocol
from serve_app.proto import serve_app_pb2

PROMPT = "A short text about the tides:"
_MESSAGES = [{"role": "user", "content": PROMPT}]
_COUNTED = re.compile(r'"(?:completion|output)_tokens": ?(\d+)')


@dataclass(frozen=True, slots=True)
class _Http:
    """How a protocol over HTTP is asked, and what its events with text look like."""

    path: str
    body: Mapping[str, Any]
    limit: str
    """The field with the most tokens."""
    piece: str


_HTTP = {
    "stream": _Http("/stream", {"messages": _MESSAGES}, "max_tokens", '"generated_text":'),
    "chat": _Http(
        "/v1/chat/completions",
        {"messages": _MESSAGES, "stream": True, "stream_options": {"include_usage": True}},
        "max_tokens",
        '"delta": {"content":',
    ),
    "messages": _Http("/v1/messages", {"messages": _MESSAGES, "stream": True}, "max_tokens", '"text_delta"'),
    "responses": _Http(
        "/v1/responses",
        {"input": PROMPT, "stream": True, "store": False},
        "max_output_tokens",
        '"type":"response.output_text.delta"',
    ),
}
PROTOCOLS = ("completions", *_HTTP, "grpc")


async def drive(url: str, grpc_target: str, protocol: str, streams: int, tokens: int) -> dict[str, Any]:
    """`streams` answers at once of `tokens` tokens each; times as of `http_load.timings`, and gaps in seconds.

    Raises RuntimeError for an answer that is refused or has fewer tokens.
    """
    limits = httpx.Limits(max_connections=streams)
    async with (
        httpx.AsyncClient(timeout=600, limits=limits, trust_env=False) as client,
        grpc.aio.insecure_channel(grpc_target, grpc_protocol.channel_options(grpc_target, resume=False)) as channel,
    ):
        epoch = time.perf_counter()

        async def one() -> StreamTimes:
            if protocol == "completions":
                return await stream_completion(client, url, "paced", [1], tokens, epoch)
            times = StreamTimes(time.perf_counter() - epoch, [])
            pieces = _called(channel, tokens) if protocol == "grpc" else _asked(client, url, _HTTP[protocol], tokens)
            async for _ in pieces:
                times.arrivals_s.append(time.perf_counter() - epoch)
            return times

        times = timings(await asyncio.gather(*(one() for _ in range(streams))))
    itl_p50_s, _, itl_p99_s = times["itl_s"]
    return times | {"itl_p50_s": itl_p50_s, "itl_p99_s": itl_p99_s}


async def _asked(client: httpx.AsyncClient, url: str, http: _Http, tokens: int) -> AsyncIterator[None]:
    """Yields for each piece of text. Raises `RuntimeError`."""
    told, last = 0, ""
    async with client.stream("POST", f"{url}{http.path}", json={**http.body, http.limit: tokens}) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}: {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if http.piece in line and line.startswith("data: "):
                yield
            elif counted := _COUNTED.findall(line):
                told = int(counted[-1])
            last = line or last
    _check(told, tokens, last)


async def _called(channel: grpc.aio.Channel, tokens: int) -> AsyncIterator[None]:
    """The same by gRPC."""
    request = grpc_protocol.request_of({"messages": _MESSAGES, "max_tokens": tokens})
    told = 0
    async for content in channel.unary_stream(grpc_protocol.STREAM)(request):
        message = serve_app_pb2.ModelOutputDocument.FromString(content)
        if message.HasField("token_id"):
            yield
        if message.HasField("done"):
            told = message.done.usage.completion_tokens
    _check(told, tokens, "no `done`")


def _check(told: int, tokens: int, last: str) -> None:
    if told != tokens:
        raise RuntimeError(f"{told} tokens instead of {tokens}; the stream ended with {last[:300]}")
