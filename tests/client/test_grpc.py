"""Both clients over gRPC, against the servicer and a scripted replica: the answers and errors that HTTP gives."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from fake_replica import FakeReplica, card, counts, says
from grpc_server import grpc_server
from memory_metrics import MemoryMetrics

from serve_app.api.app import create_app
from serve_app.api.grpc.servicer import Servicer
from serve_app.api.grpc.services import STREAM
from serve_app.api.http.pages import Pages
from serve_app.chat.prompts import PromptFormatter
from serve_app.chat.tokenizer import ChatTokenizer
from serve_app.client import (
    AsyncClient,
    BadRequest,
    Client,
    Completion,
    ConnectionLost,
    ContextLengthExceeded,
    NotReady,
    Overloaded,
    ServeAppError,
    ServerError,
    StreamError,
    synchronous_grpc,
)
from serve_app.config import ApiConfig, ChatConfig
from serve_app.core import Failure, FailureCode, GenerationDefaults, LoadStage, Priority
from serve_app.generation.attempt_history import FailoverSettings
from serve_app.generation.service import CompletionService
from serve_app.proto.serve_app_pb2 import Done, ModelOutputDocument, Usage
from serve_app.resume.context import ResumeSettings
from serve_app.resume.journal_store import JournalLimits
from serve_app.resume.memory_store import MemoryJournalStore
from serve_app.resume.registry import ResumableStreams

COUNTS = counts(6, ids=lambda index: 300 + index)
"""Six tokens of the tests' tokenizer."""
Complete = Callable[..., Awaitable[Completion]]


@pytest.fixture
def replica(tokenizer: ChatTokenizer) -> FakeReplica:
    return FakeReplica([COUNTS], state=card(vocab_size=tokenizer.vocab_size))


@pytest.fixture
async def url(replica: FakeReplica, tokenizer: ChatTokenizer) -> AsyncIterator[str]:
    failover = FailoverSettings(silence_s=60, max_attempts=3, first_backoff_s=0.001, max_backoff_s=0.01)
    service = CompletionService(replica, PromptFormatter(tokenizer, ChatConfig()), GenerationDefaults(), failover)
    resume = ResumeSettings(lease_s=0.2, tick_s=0.01, settle_s=0.5, gone_s=0.1)
    streams, responses = (
        ResumableStreams(replica, MemoryJournalStore(JournalLimits(lease_s=60)), resume, failover) for _ in range(2)
    )
    config = ApiConfig(max_streams=2)
    app = create_app(service, streams, config, MemoryMetrics(), Pages(config), responses=responses)
    async with grpc_server(Servicer(app, replica.model)) as target:
        yield f"grpc://{target}"
    await asyncio.gather(streams.aclose(), responses.aclose())


@pytest.fixture(params=["asynchronous", "blocking"])
def complete(request: pytest.FixtureRequest, url: str) -> Complete:
    """complete(**request) with one of the two clients, the blocking one in a thread."""

    async def with_async(**fields: Any) -> Completion:
        async with AsyncClient(url, retries=0, timeout_s=20) as client:
            return await client.complete(**fields)

    def with_blocking(**fields: Any) -> Completion:
        with Client(url, retries=0, timeout_s=20) as client:
            return client.complete(**fields)

    async def in_a_thread(**fields: Any) -> Completion:
        return await asyncio.to_thread(with_blocking, **fields)

    return with_async if request.param == "asynchronous" else in_a_thread


async def test_an_answer(complete: Complete, tokenizer: ChatTokenizer) -> None:
    answer = await complete(messages=[{"role": "user", "content": "Hi"}], seed=7, max_tokens=6)
    assert answer.token_ids == tuple(range(300, 306))
    assert answer.text == tokenizer.decode(list(range(300, 306)))
    assert (answer.done.finish_reason, answer.done.seed, answer.done.usage.completion_tokens) == ("length", 7, 6)


async def test_every_option_goes_over(complete: Complete, replica: FakeReplica) -> None:
    await complete(
        prompt="Hi",
        max_tokens=5,
        temperature=0.5,
        top_k=3,
        seed=-2,
        stop="#",
        cache_salt="t",
        min_p=0.25,
        priority="batch",
    )
    made = replica.requests[0]
    assert (made.max_new_tokens, made.cache_salt, made.sampling.temperature) == (5, "t", 0.5)
    assert made.priority is Priority.BATCH
    assert (made.sampling.top_k, made.sampling.min_p, made.sampling.seed) == (3, 0.25, 2**64 - 2)


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"prompt": "Hi", "max_tokens": 0}, BadRequest),
        ({"prompt": "Hi " * 300}, ContextLengthExceeded),
        ({"prompt": "Hi", "temperature": "warm"}, BadRequest),
        ({"prompt": "Hi", "surprise": 1}, BadRequest),
        ({"prompt": "Hi", "seed": 2**64}, BadRequest),
    ],
)
async def test_what_is_wrong(complete: Complete, fields: dict[str, Any], kind: type[BadRequest]) -> None:
    with pytest.raises(kind) as error:
        await complete(**fields)
    assert error.value.status == 400


async def test_an_error_in_the_stream(complete: Complete, replica: FakeReplica) -> None:
    replica.scripts[:] = [lambda request: [*COUNTS(request)[:2], Failure(FailureCode.DEADLINE_EXCEEDED, "Too late.")]]
    with pytest.raises(StreamError, match="Too late") as error:
        await complete(prompt="Hi", request_id="r1")
    assert (error.value.code, error.value.request_id) == ("deadline_exceeded", "r1")


async def test_a_failed_engine(complete: Complete, replica: FakeReplica) -> None:
    replica.scripts[:] = [says(Failure(FailureCode.POISON, "It kills."))]
    with pytest.raises(ServerError) as error:
        await complete(prompt="Hi")
    assert (error.value.status, error.value.code) == (500, "request_killed_replica")


async def test_a_loading_model_and_its_state(complete: Complete, url: str, replica: FakeReplica) -> None:
    async with AsyncClient(url) as client:
        assert (await client.ready()).ready
        replica.state = LoadStage("loading weights")
        assert not (await client.ready()).ready
        with pytest.raises(ServeAppError, match="HTTP address"):
            await client.models()
    with pytest.raises(NotReady, match="loading weights"):
        await complete(prompt="Hi")


async def test_a_full_server_is_asked_again(url: str, replica: FakeReplica) -> None:
    replica.scripts[:] = [counts(pause_s=0.01)]
    async with AsyncClient(url, retries=0) as client:
        streams = [client.stream(prompt="Hi") for _ in range(2)]
        for stream in streams:
            await anext(stream)
        with pytest.raises(Overloaded) as error:
            await client.complete(prompt="Hi")
        assert error.value.retry_after_s == 1
        for stream in streams:
            await stream.aclose()
        async with asyncio.timeout(20):
            while replica.cancelled < 2:  # noqa: ASYNC110 - the work ends with the stream
                await asyncio.sleep(0.005)
        replica.scripts[:] = [COUNTS]
        assert (await client.complete(prompt="Hi", max_tokens=6)).token_ids


async def test_no_server() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        async with AsyncClient(f"grpc://127.0.0.1:{probe.getsockname()[1]}", retries=0) as client:
            with pytest.raises(ConnectionLost, match="no server answers at grpc://"):
                await client.ready()
            with pytest.raises(ConnectionLost, match="no server answers at grpc://"):
                await client.complete(prompt="Hi")


@pytest.mark.parametrize("url", ["grpc://", "grpc://host", "grpc://host:x", "grpc://host:1/path", "ftp://host"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(ValueError, match="is not an address"):
        Client(url)


async def test_a_resumable_stream(complete: Complete) -> None:
    answer = await complete(prompt="Hi", max_tokens=6, resume=True)
    assert answer.token_ids == tuple(range(300, 306))


async def test_a_late_answer_is_not_asked_for_twice(url: str, replica: FakeReplica) -> None:
    replica.scripts[:] = [says(None)]
    async with AsyncClient(url, timeout_s=0.2) as client:
        with pytest.raises(ConnectionLost, match="not answered in time"):
            await client.complete(prompt="Hi")
    assert len(replica.requests) == 1


STREAM_ID = "s" * 22
Play = Callable[[dict[str, str], Any], Iterator[ModelOutputDocument]]


def token(index: int, *, resumable: bool = True) -> ModelOutputDocument:
    event_id = f"{STREAM_ID}:{index + 1}:0000000{index}" if resumable else ""
    return ModelOutputDocument(token_id=index, generated_text=f"{index} ", event_id=event_id)


def end(index: int) -> ModelOutputDocument:
    done = Done(finish_reason="stop", usage=Usage(prompt_tokens=1, completion_tokens=index), seed=7)
    return ModelOutputDocument(done=done, event_id=f"{STREAM_ID}:{index + 1}:ffffffff")


@contextmanager
def scripted(*plays: Play) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A server that plays one script a call: its URL, and the metadata of each call."""
    asked: list[dict[str, str]] = []
    lock = threading.Lock()

    def behavior(request: bytes, context: Any) -> Iterator[ModelOutputDocument]:
        with lock:
            asked.append(dict(context.invocation_metadata()))
            play = plays[min(len(asked), len(plays)) - 1]
        yield from play(asked[-1], context)

    service, method = STREAM[1:].split("/")
    handler = grpc.unary_stream_rpc_method_handler(behavior, response_serializer=ModelOutputDocument.SerializeToString)
    with ThreadPoolExecutor(4) as threads:
        server = grpc.server(threads, (grpc.method_handlers_generic_handler(service, {method: handler}),))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"grpc://127.0.0.1:{port}", asked
        finally:
            server.stop(None).wait()


def first_two(metadata: dict[str, str], context: Any) -> Iterator[ModelOutputDocument]:
    yield ModelOutputDocument(event_id=f"{STREAM_ID}:0")
    yield token(0)
    yield ModelOutputDocument(event_id=token(0).event_id)
    context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")


def rest(metadata: dict[str, str], context: Any) -> Iterator[ModelOutputDocument]:
    if metadata.get("last-event-id") != token(0).event_id:
        yield token(0)
    yield token(1)
    yield end(2)


def at_once(metadata: dict[str, str], context: Any) -> Iterator[ModelOutputDocument]:
    context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
    yield token(9)


def test_the_rest_comes_after_a_lost_connection() -> None:
    with scripted(first_two, at_once, rest) as (url, asked), Client(url, retries=0) as client:
        answer = client.complete(prompt="Hi", resume=True)
    assert (answer.text, answer.token_ids) == ("0 1 ", (0, 1))
    assert [each.get("last-event-id") for each in asked] == [None, token(0).event_id, token(0).event_id]
    assert all(each["x-stream-resume"] == "1" for each in asked)


def test_a_stream_that_only_opened_goes_on_too() -> None:
    def opens(metadata: dict[str, str], context: Any) -> Iterator[ModelOutputDocument]:
        yield ModelOutputDocument(event_id=f"{STREAM_ID}:0")
        context.abort(grpc.StatusCode.INTERNAL, "RST_STREAM")

    with scripted(opens, rest) as (url, asked), Client(url, retries=0) as client:
        assert client.complete(prompt="Hi", resume=True).text == "0 1 "
    assert asked[1]["last-event-id"] == f"{STREAM_ID}:0"


def test_without_resume_the_loss_is_told() -> None:
    def breaks(metadata: dict[str, str], context: Any) -> Iterator[ModelOutputDocument]:
        yield token(0, resumable=False)
        context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")

    with scripted(breaks) as (url, asked), Client(url) as client, pytest.raises(ConnectionLost, match="Socket closed"):
        client.complete(prompt="Hi")
    assert len(asked) == 1


def test_a_stream_without_an_end() -> None:
    def ends(metadata: dict[str, str], context: Any) -> Iterator[ModelOutputDocument]:
        yield token(0, resumable=False)

    with (
        scripted(ends) as (url, _),
        Client(url) as client,
        pytest.raises(ConnectionLost, match="before its last event"),
    ):
        client.complete(prompt="Hi")


def test_what_was_refused_before_it_began_is_asked_again() -> None:
    with scripted(at_once, rest) as (url, asked), Client(url, retries=1) as client:
        assert client.complete(prompt="Hi").text == "0 1 "
    assert len(asked) == 2


def test_errors_of_others_are_typed() -> None:
    def busy(metadata: dict[str, str], context: Any) -> Iterator[ModelOutputDocument]:
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "Request dropped due to backpressure")
        yield token(9)

    with scripted(busy) as (url, _), Client(url, retries=0) as client, pytest.raises(Overloaded, match="backpressure"):
        client.complete(prompt="Hi")


@pytest.mark.parametrize("url", ["grpc://127.0.0.1:1", "grpcs://127.0.0.1:1"])
def test_threads_that_share_a_client_make_one_channel(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    with Client(url) as client:
        channels = client._connections
        assert isinstance(channels, synchronous_grpc.Grpc)
        other = threading.Thread(target=channels._channel, args=(False,))

        def make(*_: Any) -> Any:
            made.append(None)
            if len(made) == 1:
                other.start()
                other.join(0.05)  # it has to wait for this channel; else it would make one of its own by now
            return SimpleNamespace(close=lambda: None)

        monkeypatch.setattr(grpc, "insecure_channel", make)
        monkeypatch.setattr(grpc, "secure_channel", make)
        channels._channel(False)
        other.join()
    assert len(made) == 1
