"""The bad clients of an abuse run against a server that answers all alike, and what the run makes of what they saw."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from loadtest import attacks
from loadtest.abuse import Good, Phase, growth, line
from loadtest.attacks import ATTACKS, CLOSED, Target, chat, malformed_body


@asynccontextmanager
async def server(answer: bytes) -> AsyncIterator[Target]:
    """Answers each connection with the same bytes once it has heard anything."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if await reader.read(65536):
                writer.write(answer)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listening:
        port = listening.sockets[0].getsockname()[1]
        yield Target("127.0.0.1", port, asyncio.get_running_loop().time() + 0.3, random.Random(1))


@pytest.mark.parametrize("name", ATTACKS)
async def test_an_attack_ends_in_its_time_and_counts_what_it_met(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attacks, "_IDLE", 50)
    async with server(b"HTTP/1.1 418 No\r\nContent-Length: 0\r\n\r\n") as target:
        await ATTACKS[name](target)
    assert target.seen
    assert set(target.seen) <= {"418", "left", "held", CLOSED, "ConnectionResetError", "BrokenPipeError"}


async def test_a_connection_without_an_answer_is_no_status() -> None:
    async with server(b"") as target:
        assert await target.ask("/", b"{}") == 0
    assert target.seen[CLOSED] == 1


async def test_a_failing_server_is_told_with_the_body_that_made_it_fail() -> None:
    async with server(b"HTTP/1.1 500 X\r\n\r\n") as target:
        await ATTACKS["malformed"](target)
    assert any(what.startswith("5xx for /") for what in target.seen)


def test_malformed_bodies_are_a_function_of_the_seed_and_mostly_no_chats() -> None:
    bodies = [malformed_body(random.Random(seed)) for seed in range(200)]
    assert bodies == [malformed_body(random.Random(seed)) for seed in range(200)]
    assert len(set(bodies)) > 150
    assert chat("Hello") not in bodies


def test_a_line_of_the_table() -> None:
    calm = Phase("calm", {}, Good([0.1, 0.2]), [])
    found = Phase("flood", {"200": 3, "503": 40}, Good([0.3], refused=2), [])
    assert line(calm, found) == "| flood | 40 503, 3 200 | 1 | 2 | 0.20, 0.20 s | 0.30, 0.30 s |"
    assert json.loads(chat("x", n=2))["n"] == 2


async def test_idle_sockets_are_opened_again_when_they_were_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attacks, "_IDLE", 50)
    target = Target("127.0.0.1", 0, float("inf"), random.Random(1))
    opened = 0

    async def close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal opened
        opened += 1
        if opened == 100:
            target.end_s = 0.0
        writer.close()

    async with await asyncio.start_server(close, "127.0.0.1", 0) as listening:
        target.port = listening.sockets[0].getsockname()[1]
        await attacks.idle_sockets(target)
    assert target.seen[CLOSED] == opened == 100


def test_only_growth_that_tells_of_a_leak_is_named() -> None:
    grown = growth({"a": 100.0, "b": 100.0}, {"a": 104.0, "b": 106.0})
    assert grown == ["b has 106.0 MB, 100.0 MB after the first round"]
