from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable

import httpx
import pytest
from asgi_driver import Exchange
from fake_replica import ALIVE, FakeReplica, Script, says, tokens
from hypothesis import given
from hypothesis import strategies as st
from memory_metrics import MemoryMetrics
from simulated_time import simulated_time
from starlette.applications import Starlette

from serve_app.api.http.sse import HEARTBEAT, json_text, one_line
from serve_app.core import FinishReason, TokenBatch
from serve_app.generation.replica import ReplicaLost

HI = {"prompt": "Hi", "max_tokens": 200}
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
MakeApp = Callable[..., Starlette]

streaming = pytest.mark.parametrize(
    ("path", "body", "headers"),
    [
        (path, body, headers)
        for path, body in (("/stream", HI), ("/v1/chat/completions", CHAT))
        for headers in ({}, {"X-Stream-Resume": "1"})
    ],
    ids=["native", "native, resumable", "chat", "chat, resumable"],
)


@pytest.fixture(autouse=True)
async def exact_time() -> AsyncIterator[None]:
    """Pauses and heartbeats last what they are to last, whatever else the machine does."""
    with simulated_time():
        yield


async def test_heartbeats_while_nothing_comes_and_never_inside_an_event(
    replica: FakeReplica, make_app: MakeApp
) -> None:
    replica.scripts = [says(tokens(0, 84), 0.07, tokens(1, 85), 0.07, tokens(2, 86, finish=FinishReason.STOP))]
    exchange = Exchange(make_app(replica, stream={"heartbeat_s": 0.02}), "POST", "/stream", HI)
    await exchange.end()
    assert exchange.complete
    assert exchange.body.count(HEARTBEAT) == 2 * 3
    for message in exchange.sent[1:]:
        for block in message["body"].split(b"\n\n"):
            assert block.replace(HEARTBEAT, b"").startswith((b"data: ", b"event: ")) or block in (b"", HEARTBEAT)


async def test_no_heartbeat_while_tokens_come(
    replica: FakeReplica, make_app: MakeApp, writes: Callable[..., Script]
) -> None:
    replica.scripts = [writes("The quick brown fox", pause_s=0.01)]
    exchange = Exchange(make_app(replica, stream={"heartbeat_s": 1.0}), "POST", "/stream", HI)
    await exchange.end()
    assert HEARTBEAT not in exchange.body


async def test_a_waiting_client_sees_heartbeats_before_the_first_token(replica: FakeReplica, make_app: MakeApp) -> None:
    replica.scripts = [says(ALIVE, 0.05, tokens(0, 84, finish=FinishReason.LENGTH))]
    exchange = Exchange(make_app(replica, stream={"heartbeat_s": 0.01}), "POST", "/stream", HI)
    await exchange.until(HEARTBEAT)
    assert exchange.status == 200
    assert b"token_id" not in exchange.body
    await exchange.end()


@streaming
async def test_heartbeats_while_it_is_queued_and_while_no_replica_is_left(
    replica: FakeReplica, make_app: MakeApp, path: str, body: dict[str, object], headers: dict[str, str]
) -> None:
    first, last = tokens(0, 84), tokens(1, 85, finish=FinishReason.LENGTH)
    replica.scripts = [
        says(ALIVE, 0.05, ALIVE, 0.05, first, ReplicaLost("died")),
        says(TokenBatch(1), 0.05, TokenBatch(1), 0.05, ReplicaLost("the next one died young", taken=False)),
        says(TokenBatch(1), 0.05, last),
    ]
    exchange = Exchange(make_app(replica, stream={"heartbeat_s": 0.02}), "POST", path, body, headers)
    await exchange.end()
    assert exchange.complete
    assert len(replica.requests) == 3
    queued, waiting = [sum(HEARTBEAT in part for part in parts) for parts in _around(exchange, b"r")]
    assert queued >= 2
    assert waiting >= 4
    assert HEARTBEAT + b"\n" not in exchange.body
    assert b"error" not in exchange.body


def _around(exchange: Exchange, text: bytes) -> tuple[list[bytes], list[bytes]]:
    """What was sent before and after the piece with this text, piece by piece."""
    pieces = [message["body"] for message in exchange.sent[1:]]
    (place,) = [place for place, piece in enumerate(pieces) if b'"%b"' % text in piece]
    return pieces[:place], pieces[place + 1 :]


async def test_the_first_token_goes_out_at_once(replica: FakeReplica, make_app: MakeApp) -> None:
    replica.scripts = [says(tokens(0, 84), None)]
    exchange = Exchange(make_app(replica), "POST", "/stream", HI)
    await exchange.until(b'"token_id":84')
    assert replica.closed == 0
    exchange.disconnect()
    await exchange.end()


async def test_what_piles_up_behind_a_slow_reader_goes_out_in_one_piece(
    replica: FakeReplica, make_app: MakeApp, writes: Callable[..., Script]
) -> None:
    replica.scripts = [writes("The quick brown fox jumps over the lazy dog", pause_s=0.001)]
    exchange = Exchange(make_app(replica), "POST", "/stream", HI)
    await exchange.until(b"data: ")
    exchange.reading.clear()
    while replica.closed == 0:  # noqa: ASYNC110 - the replica is a fake without an event
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.01)
    exchange.reading.set()
    await exchange.end()
    assert exchange.complete
    assert len(exchange.sent) < 6
    assert exchange.body.count(b"data: ") > 10


@pytest.mark.parametrize("reads_again", [True, False])
async def test_a_client_that_does_not_read_is_cut_at_the_limit_and_told_why(
    replica: FakeReplica, make_app: MakeApp, writes: Callable[..., Script], metrics: MemoryMetrics, reads_again: bool
) -> None:
    replica.scripts = [writes("word " * 150, pause_s=0.0, end=None)]
    app = make_app(replica, slow_reader_bytes=2000, stream={"drain_s": 5 if reads_again else 0.05})
    exchange = Exchange(app, "POST", "/stream", HI)
    exchange.reading.clear()
    while not replica.cancelled:  # noqa: ASYNC110 - the work ends before the client has read the rest
        await asyncio.sleep(0.001)
    if reads_again:
        exchange.reading.set()
    await exchange.end()
    assert exchange.complete is reads_again
    assert (b'event: error\ndata: {"error"' in exchange.body) is reads_again
    assert len(exchange.body) < 2500
    assert replica.cancelled == 1
    assert metrics.counters["serve_app_requests", ("/stream", "slow_reader")] == 1


@streaming
async def test_a_slow_reader_costs_its_neighbours_nothing(
    replica: FakeReplica,
    make_app: MakeApp,
    writes: Callable[..., Script],
    path: str,
    body: dict[str, object],
    headers: dict[str, str],
) -> None:
    replica.scripts = [writes("word " * 150, pause_s=0.001)]
    app = make_app(replica, slow_reader_bytes=2000)
    slow, beside = (Exchange(app, "POST", path, body, headers) for _ in range(2))
    await slow.until(b"data: ")
    slow.reading.clear()
    await beside.end()
    slow.reading.set()
    await slow.end()
    assert slow.complete
    assert slow.body.count(b"data: ") < beside.body.count(b"data: ")
    assert b'"code": "slow_reader"' in slow.body.strip().split(b"\n\n")[-1]
    assert b"the client left more than 2000 bytes unread" in slow.body
    assert beside.complete
    assert b"slow_reader" not in beside.body
    assert beside.body.strip().endswith(b"[DONE]" if path != "/stream" else b"}")
    assert len(replica.requests) == 2


async def test_a_client_that_never_reads_the_rest_is_given_up(replica: FakeReplica, make_app: MakeApp) -> None:
    exchange = Exchange(make_app(replica, stream={"drain_s": 0.02}), "POST", "/stream", HI)
    exchange.reading.clear()
    await exchange.end()
    assert replica.closed == 1
    assert not exchange.complete


LINE_ENDS = "a\x0bb\x0cc\x1cd\x1de\x1ef\x85g\u2028h\u2029i\r\nj"
"""All at which `str.splitlines` ends a line, and with it openai-node, httpx's `iter_lines` and others."""


@pytest.mark.parametrize("path", ["/stream", "/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("headers", [{}, {"X-Stream-Resume": "1"}], ids=["plain", "resumable"])
async def test_events_stay_whole_for_clients_that_end_lines_where_unicode_does(
    replica: FakeReplica,
    make_app: MakeApp,
    http: Callable[[Starlette], httpx.AsyncClient],
    writes: Callable[..., Script],
    path: str,
    headers: dict[str, str],
) -> None:
    replica.scripts = [writes(LINE_ENDS)]
    body = CHAT if path.endswith("chat/completions") else {"prompt": "Hi"}
    more = {} if path == "/stream" else {"stream": True, "logprobs": True if "messages" in body else 2}
    response = await http(make_app(replica)).post(path, json={**body, **more}, headers=headers)
    fields = {"", "data", "event", "id", "retry", "data: [DONE]"}
    lines = response.text.splitlines()
    assert {line.partition(":")[0] for line in lines} <= fields
    text = ""
    for line in lines:
        if line.startswith("data: {"):
            event = json.loads(line[6:])
            choice = (event.get("choices") or [{}])[0]
            text += event.get("generated_text") or choice.get("text") or choice.get("delta", {}).get("content") or ""
    assert text == LINE_ENDS


@given(text=st.text())
def test_json_text_is_one_line_of_the_same_text(text: str) -> None:
    for written in (json_text(text), one_line(json.dumps({"a": text}, ensure_ascii=False))):
        assert len(written.splitlines()) == 1
    assert json.loads(json_text(text)) == text
    assert json_text('a"\\é🙂') == '"a\\"\\\\é🙂"'
