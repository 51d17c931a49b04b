"""Streamed chats over HTTP, many at once: when each piece came, and that every server made the same number of tokens.

Promises to know no contender: what differs between them is the request's body. Times are seconds from the first request
of the run; a piece is an SSE event with text, which may hold more than one token.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from loadtest.compare.workload import Chat

_PACED_BUFFER_BYTES = 4096
"""What a paced reader lets lie on its side, in the socket and again in this program."""
ANSWER_TIMEOUT_S = 600.0
"""The slowest peer took 40 s for 32 streams; of long prompts 32 at once may take a slow machine minutes."""


class RequestFailed(Exception):
    """A request that was refused, broke off, or ended with another number of tokens than was asked for."""


@dataclass(slots=True)
class Stream:
    """One answer."""

    started_s: float
    arrivals_s: list[float] = field(default_factory=list)
    """Of its pieces, in order; not empty."""
    text: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def digest(self) -> str:
        """Of its text, to compare answers without keeping them."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:8]


@dataclass(frozen=True, slots=True)
class Load:
    """What a contender is asked, and how its answers are read."""

    url: str
    body: dict[str, Any]
    """Of every request, but for its messages."""
    new_tokens: int
    pace: float | None = None
    """Pieces each reader takes a second at most."""
    timeout_s: float = ANSWER_TIMEOUT_S
    """Of one answer."""


async def drive(load: Load, chats: Sequence[Chat], concurrency: int) -> list[Stream]:
    """All chats, `concurrency` of them at a time, in order. Raises `RequestFailed` when any of them fails."""
    places = asyncio.Semaphore(concurrency)
    epoch = time.perf_counter()
    # A connection for each request: some servers close theirs after a stream, and a client that takes one of those
    # for alive loses its request.
    connector = aiohttp.TCPConnector(limit=0, force_close=True, socket_factory=_small_socket if load.pace else None)
    buffer_bytes = _PACED_BUFFER_BYTES if load.pace else 2**16
    async with aiohttp.ClientSession(
        connector=connector, timeout=aiohttp.ClientTimeout(total=load.timeout_s), read_bufsize=buffer_bytes
    ) as session:

        async def one(chat: Chat) -> Stream:
            async with places:
                return await _ask(session, load, chat, epoch)

        try:
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(one(chat)) for chat in chats]
        except BaseExceptionGroup as group:
            failures, others = group.split(RequestFailed)
            if failures is None or others is not None:
                raise
            raise RequestFailed(str(failures.exceptions[0])) from group
    return [task.result() for task in running]


async def _ask(session: aiohttp.ClientSession, load: Load, chat: Chat, epoch: float) -> Stream:
    stream = Stream(time.perf_counter() - epoch)
    body = load.body | {"messages": chat, "stream": True, "temperature": 0, "max_tokens": load.new_tokens}
    try:
        async with session.post(f"{load.url}/v1/chat/completions", json=body) as response:
            if response.status != 200:
                raise RequestFailed(f"status {response.status}: {(await response.text())[:300]}")
            async for line in response.content:
                if note_line(stream, line, time.perf_counter() - epoch) and load.pace:
                    await asyncio.sleep(1 / load.pace)
    except (aiohttp.ClientError, TimeoutError) as error:
        raise RequestFailed(f"{type(error).__name__}: {error}") from error
    if stream.completion_tokens != load.new_tokens or not stream.arrivals_s:
        raise RequestFailed(f"{stream.completion_tokens} tokens instead of {load.new_tokens}")
    return stream


def note_line(stream: Stream, line: bytes, now_s: float) -> bool:
    """Take one line of an SSE answer; whether it brought text. Raises `RequestFailed` when it is an error."""
    if not line.startswith(b"data: {"):
        return False
    event = json.loads(line[6:])
    if "error" in event:
        raise RequestFailed(str(event["error"])[:300])
    if usage := event.get("usage"):
        stream.prompt_tokens = usage["prompt_tokens"]
        stream.completion_tokens = usage["completion_tokens"]
    piece = event["choices"][0]["delta"].get("content") if event.get("choices") else None
    if not piece:
        return False
    stream.arrivals_s.append(now_s)
    stream.text += piece
    return True


def _small_socket(address: aiohttp.AddrInfoType) -> socket.socket:
    family, kind, protocol, _, _ = address
    created = socket.socket(family, kind, protocol)
    created.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _PACED_BUFFER_BYTES)
    return created
