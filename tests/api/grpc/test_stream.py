"""`ServeApp/Stream` on a plain gRPC server: the same answers, errors, limits and log lines as POST /stream."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from api_keys import KEY, entry, guard_of
from fake_replica import FakeReplica, Script, card, counts
from grpc_server import grpc_server
from memory_metrics import MemoryMetrics
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serve_app.access.guessing import WRONG_KEYS
from serve_app.access.keys import new_key
from serve_app.api.grpc import documents, servicer
from serve_app.api.grpc.exchange import _EventLines
from serve_app.api.grpc.refusal import of_event
from serve_app.api.grpc.servicer import Servicer, is_local
from serve_app.api.grpc.services import STREAM
from serve_app.api.http.endpoint import INLINE_ENCODED_BYTES
from serve_app.api.http.loading import create_loading_app
from serve_app.api.http.pages import Pages
from serve_app.chat.tokenizer import ChatTokenizer
from serve_app.config import ApiConfig
from serve_app.core import Failure, FailureCode, LoadStage
from serve_app.generation.replica import ReplicaLost
from serve_app.proto.serve_app_pb2 import Message, ModelOutputDocument, PromptDocument
from serve_app.resume.journal_store import JournalLimits
from serve_app.resume.memory_store import MemoryJournalStore

MakeApp = Callable[..., Starlette]
HI = PromptDocument(messages=[Message(role="user", content="Hi")], seed=7)
Open = Callable[..., Awaitable["Caller"]]


class Caller:
    """A channel to one server."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel

    def stream(self, request: PromptDocument | bytes, *metadata: tuple[str, str], timeout: float = 60) -> Any:
        call = self.channel.unary_stream(STREAM, response_deserializer=ModelOutputDocument.FromString)
        content = request if isinstance(request, bytes) else request.SerializeToString()
        return call(content, metadata=metadata, timeout=timeout)

    async def refused(self, request: PromptDocument | bytes, *metadata: tuple[str, str]) -> tuple[Any, dict[str, Any]]:
        """(status code, the details)."""
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            [_ async for _ in self.stream(request, *metadata)]
        return refused.value.code(), json.loads(refused.value.details() or "")


@pytest.fixture
async def open_grpc(replica: FakeReplica) -> AsyncIterator[Open]:
    """open_grpc(app, bound_to=...) -> a caller of the app over gRPC."""
    async with AsyncExitStack() as open_ones:

        async def open_one(app: Starlette, bound_to: str | None = None) -> Caller:
            target = await open_ones.enter_async_context(grpc_server(Servicer(app, replica.model, bound_to)))
            channel = grpc.aio.insecure_channel(target)
            open_ones.push_async_callback(channel.close)
            return Caller(channel)

        yield open_one


@pytest.fixture
async def caller(replica: FakeReplica, make_app: MakeApp, open_grpc: Open) -> Caller:
    return await open_grpc(make_app(replica))


def sse(text: str) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]


async def test_it_gives_what_post_stream_gives(caller: Caller, api: httpx.AsyncClient) -> None:
    call = caller.stream(HI, ("x-request-id", "abc"))
    *tokens, last = [message async for message in call]
    body = {"messages": [{"role": "user", "content": "Hi"}], "seed": 7}
    *documents, done = sse((await api.post("/stream", json=body)).text)
    assert [{"token_id": each.token_id, "generated_text": each.generated_text} for each in tokens] == documents
    assert all(each.HasField("token_id") and not each.HasField("done") and not each.event_id for each in tokens)
    assert not last.HasField("token_id")
    assert (last.done.finish_reason, last.done.seed) == (done["finish_reason"], 7)
    assert last.done.usage.prompt_tokens == done["usage"]["prompt_tokens"]
    assert last.done.usage.completion_tokens == len(tokens)
    assert last.done.usage.total_tokens == done["usage"]["total_tokens"]
    assert last.done.usage.cached_prompt_tokens == 2
    trailing = dict(await call.trailing_metadata())
    assert (trailing["x-request-id"], trailing["x-seed"]) == ("abc", "7")


async def test_every_field_reaches_the_replica(caller: Caller, replica: FakeReplica, tokenizer: ChatTokenizer) -> None:
    request = PromptDocument(
        prompt="Once <|im_end|>",
        max_tokens=3,
        temperature=0.0,
        top_p=0.5,
        top_k=3,
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=-1.0,
        frequency_penalty=2.0,
        seed=2**64 - 1,
        stop=["#", "%"],
        cache_salt="tenant",
        parse_special=True,
        priority="batch",
    )
    *_, last = [message async for message in caller.stream(request)]
    assert last.done.finish_reason == "length"
    made = replica.requests[0]
    sampling = made.sampling
    assert (made.max_new_tokens, made.cache_salt, sampling.seed) == (3, "tenant", 2**64 - 1)
    assert made.priority == "batch"
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.0, 0.5, 3, 0.25)
    penalties = sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty
    assert penalties == (1.5, -1.0, 2.0)
    assert not tokenizer.control_ids.isdisjoint(made.prompt_token_ids)


async def test_stop_strings_cut(caller: Caller) -> None:
    messages = [message async for message in caller.stream(PromptDocument(prompt="Hi", stop=["brown"]))]
    assert "".join(message.generated_text for message in messages) == "The quick "
    assert messages[-1].done.finish_reason == "stop"


@pytest.mark.parametrize(
    ("request_", "param", "code"),
    [
        (PromptDocument(), "prompt", "invalid_value"),
        (PromptDocument(prompt="a", messages=[Message(role="user", content="b")]), "prompt", "invalid_value"),
        (PromptDocument(prompt="a", max_tokens=0), "max_tokens", "invalid_value"),
        (PromptDocument(prompt="a", temperature=float("nan")), "temperature", "invalid_value"),
        (PromptDocument(prompt="a", top_p=float("inf")), "top_p", "invalid_value"),
        (PromptDocument(prompt="a", top_k=2**40), "top_k", "invalid_value"),
        (PromptDocument(prompt="a", stop=["x"] * 17), "stop", "invalid_value"),
        (PromptDocument(messages=[Message(role="king", content="b")]), "messages[0].role", None),
        (PromptDocument(prompt="a").SerializeToString() + b"\xf8\x01\x01", "#31", "unknown_parameter"),
        (b"\x12\x04\xa2\x01\x01\x01", "messages[0].#20", "unknown_parameter"),
        (b"\x0a\xff", None, "invalid_protobuf"),
        (b"\x0a\x02\xff\xfe", None, "invalid_protobuf"),
    ],
)
async def test_what_is_wrong_is_said(caller: Caller, request_: Any, param: str | None, code: str | None) -> None:
    status, details = await caller.refused(request_, ("x-request-id", "r1"))
    assert status == grpc.StatusCode.INVALID_ARGUMENT
    assert set(details["error"]) == {"message", "type", "param", "code"}
    assert (details["error"]["param"], details["status"], details["request_id"]) == (param, 400, "r1")
    if code is not None:
        assert details["error"]["code"] == code


async def test_a_message_beyond_the_limit(make_app: MakeApp, replica: FakeReplica, open_grpc: Open) -> None:
    caller = await open_grpc(make_app(replica, max_body_bytes=1000))
    status, details = await caller.refused(PromptDocument(prompt="a" * 1000))
    assert (status, details["error"]["code"]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "body_too_large")
    assert not replica.requests


async def test_a_full_service_refuses(make_app: MakeApp, replica: FakeReplica, open_grpc: Open) -> None:
    replica.scripts[:] = [counts(pause_s=0.01)]
    caller = await open_grpc(make_app(replica, max_streams=1))
    first = caller.stream(HI)
    await anext(aiter(first))
    status, details = await caller.refused(HI)
    assert (status, details["error"]["code"]) == (grpc.StatusCode.UNAVAILABLE, "overloaded")
    assert details["retry_after_s"] == 1
    first.cancel()


async def test_a_model_that_loads(open_grpc: Open, replica: FakeReplica, metrics: MemoryMetrics) -> None:
    async def loading() -> LoadStage:
        return LoadStage("loading weights", 0.5)

    caller = await open_grpc(create_loading_app(loading, metrics, Pages(ApiConfig())))
    status, details = await caller.refused(HI)
    assert (status, details["error"]["code"]) == (grpc.StatusCode.UNAVAILABLE, "not_ready")
    assert "loading weights" in details["error"]["message"]


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (Failure(FailureCode.DEADLINE_EXCEEDED, "Too late."), grpc.StatusCode.DEADLINE_EXCEEDED),
        (Failure(FailureCode.POISON, "It kills."), grpc.StatusCode.INTERNAL),
        (Failure(FailureCode.WRONG_WEIGHTS, "Gone."), grpc.StatusCode.UNAVAILABLE),
        (KeyError("a bug"), grpc.StatusCode.INTERNAL),
    ],
)
async def test_an_error_in_the_stream_comes_after_its_tokens(
    caller: Caller, replica: FakeReplica, writes: Callable[..., Script], failure: Any, code: grpc.StatusCode
) -> None:
    replica.scripts[:] = [writes("The quick", end=failure)]
    call = caller.stream(HI, ("x-request-id", "r2"))
    messages = aiter(call)
    assert (await anext(messages)).generated_text.startswith("The")
    with pytest.raises(grpc.aio.AioRpcError) as error:
        [_ async for _ in messages]
    details = json.loads(error.value.details() or "")
    assert (error.value.code(), details["request_id"]) == (code, "r2")
    assert "KeyError" not in (error.value.details() or "")


async def test_a_replica_dies_and_nothing_is_seen(
    caller: Caller, replica: FakeReplica, writes: Callable[..., Script]
) -> None:
    expected = [message async for message in caller.stream(HI)]
    replica.requests.clear()
    replica.scripts[:] = [writes("The quick brown", end=ReplicaLost("killed")), writes()]
    assert [message async for message in caller.stream(HI)] == expected
    assert len(replica.requests) == 2


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - any condition, of things that tell nobody
            await asyncio.sleep(0.005)


async def test_cancelling_stops_the_work(
    caller: Caller, replica: FakeReplica, caplog: pytest.LogCaptureFixture
) -> None:
    replica.scripts[:] = [counts(pause_s=0.01)]
    caplog.set_level(logging.INFO, logger="serve_app.access")
    call = caller.stream(HI)
    await anext(aiter(call))
    call.cancel()
    await until(lambda: replica.cancelled == 1)
    await until(lambda: "outcome=disconnected" in caplog.text)


async def test_a_callers_deadline_stops_the_work(caller: Caller, replica: FakeReplica) -> None:
    replica.scripts[:] = [counts(pause_s=0.01)]
    for timeout in (0.2, 2, 20):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            [_ async for _ in caller.stream(HI, timeout=timeout)]
        assert error.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        if replica.requests:  # else this machine is busy, and the call came too late
            break
    await until(lambda: replica.cancelled == 1)


async def test_log_and_metrics_name_the_call(
    caller: Caller, metrics: MemoryMetrics, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="serve_app.access")
    messages = [message async for message in caller.stream(HI, ("x-request-id", "r3"))]
    await caller.refused(PromptDocument(prompt="secret", max_tokens=0))
    lines = [record.getMessage() for record in caplog.records if record.name == "serve_app.access"]
    assert f"request_id=r3 endpoint={STREAM} status=200 outcome=stop" in lines[0]
    assert f"output_tokens={len(messages) - 1}" in lines[0]
    assert f"endpoint={STREAM} status=400 outcome=invalid_value" in lines[1]
    assert "secret" not in caplog.text
    assert metrics.counters["serve_app_requests", (STREAM, "stop")] == 1
    assert metrics.gauges["serve_app_requests_in_progress", ()] == 0


async def test_a_slow_caller_is_cut_and_its_place_is_free(
    make_app: MakeApp, replica: FakeReplica, open_grpc: Open, writes: Callable[..., Script], metrics: MemoryMetrics
) -> None:
    replica.state = card(vocab_size=512, context_tokens=300_000)
    replica.scripts[:] = [counts(100_000, ids=lambda index: 300)]
    app = make_app(replica, stream={"slow_reader_bytes": 50_000, "drain_s": 0.1})
    caller = await open_grpc(app)
    call = caller.stream(PromptDocument(prompt="Hi", max_tokens=100_000))
    await anext(aiter(call))
    await until(lambda: metrics.gauges["serve_app_requests_in_progress", ()] == 0)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        [_ async for _ in call]
    assert error.value.code() in (grpc.StatusCode.ABORTED, grpc.StatusCode.UNAVAILABLE)


async def test_a_limit_beyond_the_context_is_cut(caller: Caller) -> None:
    call = caller.stream(PromptDocument(prompt="a", max_tokens=2**62))
    assert [message async for message in call][-1].done.finish_reason == "stop"
    assert dict(await call.trailing_metadata())["x-clamped-fields"].startswith("max_tokens=")


@pytest.mark.parametrize("bound_to", ["0.0.0.0", "127.0.0.1", None])
async def test_callers_of_this_machine_are_served(
    make_app: MakeApp, replica: FakeReplica, open_grpc: Open, bound_to: str | None
) -> None:
    caller = await open_grpc(make_app(replica), bound_to)
    assert [message async for message in caller.stream(HI)][-1].done.seed == 7


RESUMABLE = ("x-stream-resume", "1")


def carries(message: ModelOutputDocument) -> bool:
    """Whether it has a token or the end, and not only the id of an event."""
    return bool(message.HasField("token_id") or message.HasField("done"))


async def test_a_stream_is_resumed_by_the_number_of_its_event(caller: Caller, replica: FakeReplica) -> None:
    opening, *messages = [message async for message in caller.stream(HI, RESUMABLE)]
    assert not carries(opening)
    assert all(carries(message) for message in messages)
    numbers = [int(message.event_id.split(":")[1]) for message in messages]
    assert numbers == list(range(1, len(messages) + 1))
    for known in (1, 5, len(messages)):
        after = ("last-event-id", messages[known - 1].event_id)
        assert [each async for each in caller.stream(PromptDocument(), RESUMABLE, after)] == messages[known:]
    whole = caller.stream(PromptDocument(), RESUMABLE, ("last-event-id", opening.event_id))
    assert [each async for each in whole] == messages
    assert len(replica.requests) == 1


async def test_a_caller_that_leaves_continues_over_http_and_back(
    make_app: MakeApp, replica: FakeReplica, open_grpc: Open, http: Callable[[Starlette], httpx.AsyncClient]
) -> None:
    replica.scripts[:] = [counts(30, pause_s=0.005, ids=lambda index: 300 + index)]
    app = make_app(replica)
    caller, api = await open_grpc(app), http(app)
    call = caller.stream(PromptDocument(prompt="Hi", max_tokens=30), RESUMABLE)
    messages = aiter(call)
    seen = [await anext(messages) for _ in range(4)]
    call.cancel()
    stream_id = seen[0].event_id.partition(":")[0]
    rest = await api.get(f"/v1/streams/{stream_id}", headers={"Last-Event-ID": seen[-1].event_id})
    over_http = [document["token_id"] for document in sse(rest.text) if "token_id" in document]
    assert [message.token_id for message in seen[1:]] + over_http == list(range(300, 330))
    again = caller.stream(PromptDocument(), RESUMABLE, ("last-event-id", seen[-1].event_id))
    assert [message.token_id async for message in again if message.HasField("token_id")] == over_http


@pytest.mark.parametrize(
    ("metadata", "status", "code"),
    [
        ((RESUMABLE, ("last-event-id", "x")), grpc.StatusCode.INVALID_ARGUMENT, "invalid_event_id"),
        ((RESUMABLE, ("last-event-id", "s" * 22 + ":1")), grpc.StatusCode.FAILED_PRECONDITION, "stream_gone"),
        ((("x-stream-resume", "yes"),), grpc.StatusCode.INVALID_ARGUMENT, "invalid_value"),
    ],
)
async def test_what_can_not_be_resumed(caller: Caller, metadata: Any, status: grpc.StatusCode, code: str) -> None:
    refused, details = await caller.refused(HI, *metadata)
    assert (refused, details["error"]["code"]) == (status, code)


async def test_a_stream_belongs_to_who_began_it(caller: Caller) -> None:
    mine = ("authorization", "Bearer mine")
    messages = [message async for message in caller.stream(HI, RESUMABLE, mine)]
    after = ("last-event-id", messages[3].event_id)
    assert [each async for each in caller.stream(PromptDocument(), RESUMABLE, mine, after)] == messages[4:]
    status, details = await caller.refused(PromptDocument(), RESUMABLE, after, ("authorization", "Bearer yours"))
    assert (status, details["error"]["code"]) == (grpc.StatusCode.NOT_FOUND, "stream_not_found")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "stream": True}),
        ("/v1/completions", {"prompt": "Hi", "stream": True}),
    ],
)
async def test_a_stream_in_another_format_is_refused(
    make_app: MakeApp,
    replica: FakeReplica,
    open_grpc: Open,
    http: Callable[[Starlette], httpx.AsyncClient],
    path: str,
    body: dict[str, Any],
) -> None:
    app = make_app(replica)
    caller = await open_grpc(app)
    response = await http(app).post(path, json=body, headers={"X-Stream-Resume": "1"})
    after = ("last-event-id", f"{response.headers['x-stream-id']}:0")
    status, details = await caller.refused(PromptDocument(), RESUMABLE, after)
    assert (status, details["error"]["code"]) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid_event_id")


@pytest.mark.parametrize(
    "event",
    [
        {"type": "error", "error": {"type": "overloaded_error", "message": "Busy."}},  # Anthropic's
        {"type": "error", "code": "overloaded", "message": "Busy.", "param": None, "sequence_number": 3},  # Responses'
    ],
)
def test_an_error_in_another_format(event: dict[str, Any]) -> None:
    """What a caller gets who resumes such a stream just before its error."""
    refused = of_event(json.dumps(event).encode(), "r1")
    assert refused.code == grpc.StatusCode.INVALID_ARGUMENT
    assert json.loads(refused.details)["error"]["code"] == "invalid_event_id"


async def test_heartbeats_of_a_resumable_stream(make_app: MakeApp, replica: FakeReplica, open_grpc: Open) -> None:
    replica.scripts[:] = [counts(3, pause_s=0.2, ids=lambda index: 300 + index)]
    caller = await open_grpc(make_app(replica, heartbeat_s=0.05))
    messages = [message async for message in caller.stream(HI, RESUMABLE)]
    beats = [message for message in messages[1:] if not carries(message)]
    assert beats
    assert {beat.event_id for beat in beats} <= {message.event_id for message in messages}
    plain = [message async for message in caller.stream(HI)]
    assert all(carries(message) for message in plain)


@pytest.mark.parametrize(
    ("peer", "local"),
    [
        ("ipv4:127.0.0.1:5000", True),
        ("ipv4:127.8.0.1:5000", True),
        ("ipv6:[::1]:5000", True),
        ("ipv6:%5B::1%5D:5000", True),
        ("ipv6:[::ffff:127.0.0.1]:5000", True),
        ("unix:/tmp/x", True),
        ("ipv4:10.0.0.1:5000", False),
        ("ipv6:[fe80::1%25eth0]:5000", False),
        ("ipv6:[::ffff:10.0.0.1]:5000", False),
        ("", False),
    ],
)
def test_who_is_on_this_machine(peer: str, local: bool) -> None:
    assert is_local(peer) is local


async def test_callers_of_other_machines_are_refused_where_http_is_local(
    make_app: MakeApp, replica: FakeReplica, open_grpc: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servicer, "is_local", lambda peer: False)
    caller = await open_grpc(make_app(replica), "127.0.0.1")
    status, details = await caller.refused(HI)
    assert (status, details["error"]["code"]) == (grpc.StatusCode.PERMISSION_DENIED, "host_not_allowed")
    assert [_ async for _ in (await open_grpc(make_app(replica), "0.0.0.0")).stream(HI)]


@pytest.mark.parametrize("letters", [10, INLINE_ENCODED_BYTES])
async def test_a_large_message_is_read_in_a_thread(
    caller: Caller, letters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, threads = documents.read_prompt, list[threading.Thread]()

    def noted(content: bytes) -> dict[str, Any]:
        threads.append(threading.current_thread())
        return read(content)

    monkeypatch.setattr(documents, "read_prompt", noted)
    status, _ = await caller.refused(PromptDocument(prompt="a" * letters, max_tokens=0))
    assert status == grpc.StatusCode.INVALID_ARGUMENT
    [thread] = threads
    assert (thread is threading.current_thread()) == (letters == 10)


async def test_a_message_of_many_fields_is_refused_before_it_is_decoded(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PromptDocument, "FromString", None)
    status, details = await caller.refused(b"\x12\x00" * 2**20, ("x-request-id", "r1"))
    assert (status, details["error"]["code"]) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid_value")
    assert "more than 32768 fields" in details["error"]["message"]


def test_events_may_come_in_any_pieces() -> None:
    """What is between the application and gRPC: each event once, whatever the chunks."""
    content = b""
    for number in range(20):
        content += b'id: s:%d:0\ndata: {"token_id":%d,"generated_text":" a\\n"}\n\n: ping\n' % (number, number)
    for size in (1, 7, len(content)):
        lines = _EventLines()
        chunks = [content[at : at + size] for at in range(0, len(content), size)]
        events = [event for chunk in chunks for event in lines.push(chunk)]
        tokens = [documents.answer(event.name, event.data, event.id) for event in events if event.name]
        assert [(token.token_id, token.event_id) for token in tokens] == [(n, f"s:{n}:0") for n in range(20)]
        assert len(events) == 40


async def test_a_caller_that_has_all_gets_nothing_more_also_before_the_end_is_in_the_store(
    make_app: MakeApp, replica: FakeReplica, open_grpc: Open
) -> None:
    store = MemoryJournalStore(JournalLimits(lease_s=60))
    here, there = [await open_grpc(make_app(replica, journals=store)) for _ in range(2)]
    seen = [message async for message in here.stream(HI, ("x-stream-resume", "1"))]
    again = ("x-stream-resume", "1"), ("last-event-id", seen[-1].event_id)
    for caller in (here, there):
        rest = [message async for message in caller.stream(HI, *again)]
        assert not [message for message in rest if message.HasField("token_id") or message.HasField("done")]


async def test_a_stream_that_ends_without_an_end_is_cut(open_grpc: Open) -> None:
    async def cut(request: Request) -> Response:
        return Response('data: {"token_id":5,"generated_text":"a"}\n\n', media_type="text/event-stream")

    caller = await open_grpc(Starlette(routes=[Route("/stream", cut, methods=["POST"])]))
    status, details = await caller.refused(HI)
    assert (status, details["error"]["code"]) == (grpc.StatusCode.UNAVAILABLE, "stream_cut")


async def test_calls_need_a_key_and_the_health_check_needs_none(
    make_app: MakeApp, replica: FakeReplica, open_grpc: Open, tmp_path: Path
) -> None:
    other = new_key()
    guard = guard_of(tmp_path / "keys.yaml", entry("alice", KEY), entry("limited", other, models=["another"]))
    caller = await open_grpc(make_app(replica, guard=guard))
    for metadata in ((), (("authorization", "Bearer sa-wrong"),), (("x-api-key", "sa-wrong"),)):
        status, details = await caller.refused(HI, *metadata)
        assert (status, details["error"]["code"]) == (grpc.StatusCode.UNAUTHENTICATED, "invalid_api_key")
    status, details = await caller.refused(HI, ("authorization", f"Bearer {other}"))
    assert (status, details["error"]["code"]) == (grpc.StatusCode.PERMISSION_DENIED, "model_not_allowed")
    assert not replica.requests
    for name, value in (("authorization", f"Bearer {KEY}"), ("x-api-key", KEY)):
        assert [_ async for _ in caller.stream(HI, (name, value))]
    assert {request.tenant for request in replica.requests} == {"alice"}
    assert await caller.channel.unary_unary("/grpc.health.v1.Health/Check")(b"") == b"\x08\x01"


async def test_guessing_is_slowed_by_the_address_of_the_call(
    make_app: MakeApp, replica: FakeReplica, open_grpc: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servicer, "address_of", lambda peer: "203.0.113.7")
    caller = await open_grpc(make_app(replica, guard=guard_of(tmp_path / "keys.yaml")))
    refusals = [await caller.refused(HI, ("x-api-key", f"sa-{number}")) for number in range(WRONG_KEYS + 1)]
    assert {status for status, _ in refusals[:-1]} == {grpc.StatusCode.UNAUTHENTICATED}
    status, details = refusals[-1]
    assert (status, details["retry_after_s"] > 0) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)
    right = await caller.refused(HI, ("x-api-key", KEY))
    assert right[0] == grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    ("peer", "address"),
    [("ipv4:192.0.2.1:50000", "192.0.2.1"), ("ipv6:%5B2001:db8::1%5D:5", "2001:db8::1"), ("unix:/x", None), ("", None)],
)
def test_the_address_of_a_peer(peer: str, address: str | None) -> None:
    assert servicer.address_of(peer) == address
