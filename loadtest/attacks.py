"""Ways to be a bad client, each seeded and bounded, on raw sockets where a client library would be too polite.

An attack runs until it has done all its attempts or its time is over, and counts how each attempt ended: by the
status of the answer, or by what happened to the connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import resource
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

CHAT = "/v1/chat/completions"
_READ_S = 120.0
_IDLE = 2000
"""Connections that say nothing."""
CLOSED = "closed without an answer"
"""How an attempt ends whose connection the server closed without a status."""


@dataclass(slots=True)
class Target:
    """Who is attacked, and for how long."""

    host: str
    port: int
    end_s: float
    """On the event loop's clock: no attempt begins after it."""
    chance: random.Random
    headers: dict[str, str] = field(default_factory=dict)
    """Of a caller that may ask: a key."""
    seen: Counter[str] = field(default_factory=Counter)
    """How many attempts ended in which way."""

    @property
    def over(self) -> bool:
        return asyncio.get_running_loop().time() >= self.end_s

    def request(self, path: str, body: bytes, method: str = "POST", **headers: str) -> bytes:
        """A whole request, as bytes."""
        lines = [f"{method} {path} HTTP/1.1", f"Host: {self.host}:{self.port}", "Connection: close"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in {**self.headers, **headers}.items()]
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"] if body else []
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + body

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """One connection, aborted at the end. What goes wrong with it is counted."""
        try:
            async with asyncio.timeout(_READ_S):
                reader, writer = await asyncio.open_connection(self.host, self.port)
                try:
                    yield reader, writer
                finally:
                    writer.transport.abort()
        except TimeoutError:
            self.seen["no answer in time"] += 1
        except OSError as error:
            self.seen[type(error).__name__] += 1

    async def status(self, reader: asyncio.StreamReader) -> int:
        """The status of the answer; 0 where the connection ends without one. It is counted."""
        with contextlib.suppress(asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
            line = await reader.readuntil(b"\r\n")
            status = int(line.split()[1])
            self.seen[str(status)] += 1
            return status
        self.seen[CLOSED] += 1
        return 0

    async def ask(self, path: str, body: bytes, method: str = "POST", **headers: str) -> int:
        """One request and the status of its answer, of which no more is read."""
        async with self.connection() as (reader, writer):
            with contextlib.suppress(ConnectionError):  # refused while it is being sent: the answer says why
                writer.write(self.request(path, body, method, **headers))
                await writer.drain()
            return await self.status(reader)
        return 0


Attack = Callable[[Target], Awaitable[None]]


def chat(content: str, **fields: object) -> bytes:
    """A chat's body."""
    return json.dumps({"messages": [{"role": "user", "content": content}], "max_tokens": 32, **fields}).encode()


async def _workers(count: int, attempts: int, target: Target, one: Callable[[int], Awaitable[object]]) -> None:
    """`attempts` calls of `one` with their numbers, `count` at a time, until the target's time is over."""
    numbers = iter(range(attempts))

    async def work() -> None:
        for number in numbers:
            if target.over:
                return
            await one(number)

    await asyncio.gather(*(work() for _ in range(count)))


async def flood(target: Target) -> None:
    """400 chats at once, and each that is refused asks again at once: far more than can be answered."""

    async def one(number: int) -> None:
        async with target.connection() as (reader, writer):
            writer.write(target.request(CHAT, chat(f"Count to {number}.", stream=True)))
            if await target.status(reader) == 200:
                while await reader.read(65536):
                    pass

    await _workers(400, 100_000, target, one)


async def _trickle(target: Target, at_once: bytes, slowly: bytes) -> None:
    """One connection that sends the rest of its request a byte a second."""
    async with target.connection() as (reader, writer):
        answer = asyncio.ensure_future(target.status(reader))
        writer.write(at_once)
        for byte in slowly:
            if answer.done() or target.over:
                break
            with contextlib.suppress(ConnectionError):
                writer.write(bytes([byte]))
            await asyncio.wait({answer}, timeout=1)
        if not answer.done():
            target.seen["held"] += 1
        answer.cancel()


async def slow_headers(target: Target) -> None:
    """300 connections that send their headers a byte a second."""

    async def one(number: int) -> None:
        await _trickle(target, b"", target.request("/v1/models", b"", "GET", x_slow="y" * 200))

    await _workers(300, 300, target, one)


async def slow_bodies(target: Target) -> None:
    """300 connections that say that a body comes, and send it a byte a second."""

    async def one(number: int) -> None:
        head, between, body = target.request(CHAT, chat("x" * 1000)).partition(b"\r\n\r\n")
        await _trickle(target, head + between, body)

    await _workers(300, 300, target, one)


async def never_read(target: Target) -> None:
    """40 clients that ask for streams with logprobs and read nothing."""

    async def one(number: int) -> None:
        async with target.connection() as (_, writer):
            body = chat("Write.", stream=True, max_tokens=400, ignore_eos=True, logprobs=True, top_logprobs=20)
            writer.write(target.request(CHAT, body))
            await asyncio.sleep(max(0.0, target.end_s - asyncio.get_running_loop().time()))
            target.seen["held"] += 1

    await _workers(40, 40, target, one)


async def idle_sockets(target: Target) -> None:
    """2,000 connections that say nothing, opened again whenever the server has closed them.

    On plain sockets, since an event loop that watches so many would itself take time from the good clients.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 8192)), hard))
    held: list[socket.socket] = []
    try:
        while not target.over:
            for opened in range(_IDLE - len(held)):
                held.append(socket.socket())
                held[-1].setblocking(False)
                held[-1].connect_ex((target.host, target.port))
                if opened % 100 == 99:
                    await asyncio.sleep(0.01)
            await asyncio.sleep(0.5)
            ended = {idle for idle in held if _has_ended(idle)}
            held = [idle for idle in held if idle not in ended]
            target.seen[CLOSED] += len(ended)
            for idle in ended:
                idle.close()
        target.seen["held"] += len(held)
    finally:
        for idle in held:
            idle.close()


def _has_ended(idle: socket.socket) -> bool:
    """Whether the server has closed the connection."""
    try:
        return not idle.recv(4096)
    except BlockingIOError:
        return False
    except OSError:  # refused or reset
        return True


def malformed_body(chance: random.Random) -> bytes:
    """A body that is nearly a chat: cut, with bytes changed, or with a value of another kind somewhere."""
    good = chat("Hello", temperature=0.5, stop=["a"], tools=[{"type": "function", "function": {"name": "f"}}])
    kind = chance.randrange(4)
    if kind == 0:
        return good[: chance.randrange(1, len(good) - 1)]
    if kind == 1:
        changed = bytearray(good)
        for _ in range(chance.randrange(1, 8)):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        return bytes(changed)
    document = json.loads(good)
    strange: object = chance.choice([None, [], {}, -1, 1e400, "\ud800", "x" * 1000, True, [[]], {"": {}}, 2**70])
    if kind == 2:
        document[chance.choice([*document, "n", "seed", "logprobs", "response_format", "stream"])] = strange
    else:
        document["messages"] = chance.choice(
            [strange, [strange], [{"role": strange}], [{"role": "user", "content": strange}]]
        )
    return json.dumps(document).encode()


async def malformed(target: Target) -> None:
    """10,000 bodies that are nearly chats, on all endpoints that take one."""
    paths = (CHAT, "/stream", "/v1/completions", "/v1/messages", "/v1/responses", "/tokenize", "/detokenize")
    first = target.chance.getrandbits(32)

    async def one(number: int) -> None:
        chance = random.Random(first + number)
        path, body = chance.choice(paths), malformed_body(chance)
        if await target.ask(path, body) >= 500:
            target.seen[f"5xx for {path} {body[:200]!r}"] += 1

    await _workers(16, 10_000, target, one)


async def giant_and_deep(target: Target) -> None:
    """Bodies of 5 MB, and of brackets a million deep."""
    bodies = [
        chat("x" * 5_000_000),
        b"[" * 1_000_000,
        b'{"messages":' * 100_000,
        b'{"messages": [' + b"{}," * 1_000_000,
    ]

    async def one(number: int) -> None:
        await target.ask(CHAT, bodies[number % len(bodies)])

    await _workers(8, 200, target, one)


async def header_floods(target: Target) -> None:
    """Requests of 1,000 headers, and of one header of 100 kB."""

    async def one(number: int) -> None:
        many = {f"x-{place}": "y" for place in range(1000)} if number % 2 else {"x-long": "y" * 100_000}
        await target.ask("/v1/models", b"", "GET", **many)

    await _workers(16, 500, target, one)


async def key_guessing(target: Target) -> None:
    """Requests with keys that nobody has."""
    before, target.headers = target.headers, {}

    async def one(number: int) -> None:
        await target.ask("/v1/models", b"", "GET", authorization=f"Bearer sk-{target.chance.getrandbits(128):032x}")

    await _workers(16, 2000, target, one)
    target.headers = before


async def cancel_storm(target: Target) -> None:
    """10,000 streams whose clients leave at a random moment, within half a second."""

    async def one(number: int) -> None:
        leaves_s, resumable = target.chance.random() / 2, str(number % 2)
        async with target.connection() as (reader, writer):
            body = chat(f"Tell {number}.", stream=True, max_tokens=64)
            writer.write(target.request(CHAT, body, x_stream_resume=resumable))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(leaves_s):
                    await target.status(reader)
                    while await reader.read(65536):
                        pass
            target.seen["left"] += 1

    await _workers(64, 10_000, target, one)


async def resume_storm(target: Target) -> None:
    """Resumes of streams that never were, and of one that is, over and over."""
    stream_id = ""
    async with target.connection() as (reader, writer):
        writer.write(target.request(CHAT, chat("Hello", stream=True), x_stream_resume="1"))
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        stream_id = head.partition("x-stream-id: ")[2].partition("\r\n")[0]
        stream_id = "" if not stream_id else (await reader.read(4096)).decode().partition("id: ")[2].partition(":")[0]

    async def one(number: int) -> None:
        wanted = stream_id if stream_id and number % 2 else "".join(target.chance.choices("abcdefgh", k=22))
        await target.ask(f"/v1/streams/{wanted}", b"", "GET", x_stream_resume="1", last_event_id=f"{wanted}:1")

    await _workers(32, 3000, target, one)


ATTACKS: dict[str, Attack] = {
    "flood": flood,
    "slow headers": slow_headers,
    "slow bodies": slow_bodies,
    "never read": never_read,
    "idle sockets": idle_sockets,
    "malformed": malformed,
    "giant and deep": giant_and_deep,
    "header floods": header_floods,
    "key guessing": key_guessing,
    "cancel storm": cancel_storm,
    "resume storm": resume_storm,
}
