"""Both clients against a scripted server: documents, errors, retries, cancelling."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from fake_api import Exchange, FakeApi, say

from serve_app import client as serve_client
from serve_app.client import (
    AsyncClient,
    AuthenticationError,
    BadRequest,
    Client,
    Completion,
    ConnectionLost,
    ContextLengthExceeded,
    Done,
    ModelOutputDocument,
    NotReady,
    Overloaded,
    PermissionDenied,
    ServeAppError,
    ServerError,
    StreamError,
    Usage,
)
from serve_app.client.protocol import read_readiness

Call = Callable[..., Any]


@pytest.fixture(params=["sync", "async"])
def call(request: pytest.FixtureRequest, api: FakeApi) -> Call:
    """call(method, client settings, **arguments) on a client of either kind."""

    def synchronous(method: str, settings: dict[str, Any] | None = None, **arguments: Any) -> Any:
        with Client(**{"base_url": api.url, **(settings or {})}) as client:
            return getattr(client, method)(**arguments)

    def asynchronous(method: str, settings: dict[str, Any] | None = None, **arguments: Any) -> Any:
        async def run() -> Any:
            async with AsyncClient(**{"base_url": api.url, **(settings or {})}) as client:
                return await getattr(client, method)(**arguments)

        return asyncio.run(run())

    return synchronous if request.param == "sync" else asynchronous


DONE = Done("stop", Usage(3, 3), 7)


def test_complete_joins_the_documents(api: FakeApi, call: Call) -> None:
    api.routes["/stream"] = say("Hé", "llo ", "🙂")
    answer = call("complete", prompt="p", max_tokens=5, stop=["\n"], seed=None, request_id="mine")
    assert answer == Completion("Héllo 🙂", (0, 1, 2), DONE)
    assert answer.done.usage.total_tokens == 6
    (asked,) = api.asked("/stream")
    assert asked.json == {"prompt": "p", "max_tokens": 5, "stop": ["\n"]}
    assert asked.headers["x-request-id"] == "mine"


def test_text_after_the_last_token_adds_no_token(api: FakeApi, call: Call) -> None:
    def route(exchange: Exchange) -> None:
        exchange.start_stream()
        for token_id, text in ((4, "a"), (5, ""), (5, "\ufffd")):
            exchange.token(token_id, text)
        exchange.done(2)
        exchange.end_stream()

    api.routes["/stream"] = route
    answer = call("complete", prompt="p")
    assert (answer.text, answer.token_ids) == ("a\ufffd", (4, 5))


def test_messages_are_sent_as_they_are(api: FakeApi, call: Call) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    call("complete", messages=messages)
    assert api.asked("/stream")[0].json == {"messages": messages}


def test_documents_arrive_before_the_stream_ends(api: FakeApi) -> None:
    first_read = threading.Event()

    def route(exchange: Exchange) -> None:
        exchange.start_stream()
        exchange.write(b": ping\n")
        exchange.token(5, "one")
        assert first_read.wait(10)
        exchange.write(b"event: of-a-newer-server\ndata: ?\n\n")
        exchange.token(6, "two")
        exchange.done(2)
        exchange.end_stream()

    api.routes["/stream"] = route
    with Client(api.url) as client, client.stream(prompt="p") as stream:
        assert next(stream) == ModelOutputDocument(5, "one")
        assert stream.done is None
        first_read.set()
        assert list(stream) == [ModelOutputDocument(6, "two")]
        assert stream.done == Done("stop", Usage(3, 2), 7)
        assert list(stream) == []


async def test_async_documents_arrive_before_the_stream_ends(api: FakeApi) -> None:
    first_read = threading.Event()

    def route(exchange: Exchange) -> None:
        exchange.start_stream()
        exchange.token(5, "one")
        assert first_read.wait(10)
        exchange.done(1)
        exchange.end_stream()

    api.routes["/stream"] = route
    async with AsyncClient(api.url) as client, client.stream(prompt="p") as stream:
        assert await anext(stream) == ModelOutputDocument(5, "one")
        first_read.set()
        assert [document async for document in stream] == []
        assert stream.done is not None


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, "invalid_request", BadRequest),
        (400, "context_length_exceeded", ContextLengthExceeded),
        (404, "not_found", BadRequest),
        (413, None, BadRequest),
        (429, "rate_limit_exceeded", Overloaded),
        (503, "overloaded", Overloaded),
        (503, "not_ready", NotReady),
        (500, "internal", ServerError),
        (504, None, ServerError),
    ],
)
def test_each_status_has_its_error(
    api: FakeApi, call: Call, status: int, code: str | None, kind: type[serve_client.APIError]
) -> None:
    api.routes["/stream"] = lambda exchange: exchange.refuse(status, code, "No.", {"X-Request-Id": "abc"})
    with pytest.raises(ServeAppError) as raised:
        call("complete", {"retries": 0}, prompt="p")
    error = raised.value
    assert type(error) is kind
    assert (error.status, error.code, error.message, error.request_id) == (status, code, "No.", "abc")
    assert "No." in str(error)
    assert "abc" in str(error)


def test_an_error_page_of_something_in_between(api: FakeApi, call: Call) -> None:
    api.routes["/stream"] = lambda exchange: exchange.answer(502, b"<html>Bad gateway</html>")
    with pytest.raises(ServerError, match="answered 502"):
        call("complete", prompt="p")


def refuse_then_say(status: int, code: str, refusals: int, headers: dict[str, str]) -> Callable[[Exchange], None]:
    left = [refusals]

    def route(exchange: Exchange) -> None:
        if left[0]:
            left[0] -= 1
            exchange.refuse(status, code, "Later.", headers)
        else:
            say("ok")(exchange)

    return route


@pytest.mark.parametrize(("status", "code"), [(429, "overloaded"), (503, "overloaded"), (503, "not_ready")])
def test_refusals_are_repeated_as_the_server_asks(api: FakeApi, call: Call, status: int, code: str) -> None:
    api.routes["/stream"] = refuse_then_say(status, code, 2, {"Retry-After": "0.05"})
    assert call("complete", prompt="p").text == "ok"
    assert len(api.asked("/stream")) == 3


def test_retries_are_bounded(api: FakeApi, call: Call) -> None:
    api.routes["/stream"] = refuse_then_say(503, "overloaded", 9, {"Retry-After": "0"})
    with pytest.raises(Overloaded) as raised:
        call("complete", {"retries": 3}, prompt="p")
    assert raised.value.retry_after_s == 0
    assert len(api.asked("/stream")) == 4


def test_a_long_retry_after_is_told_and_not_waited_for(api: FakeApi, call: Call) -> None:
    api.routes["/stream"] = refuse_then_say(503, "overloaded", 9, {"Retry-After": "3600"})
    with pytest.raises(Overloaded) as raised:
        call("complete", prompt="p")
    assert raised.value.retry_after_s == 3600
    assert len(api.asked("/stream")) == 1


def test_other_errors_are_not_repeated(api: FakeApi, call: Call) -> None:
    api.routes["/stream"] = lambda exchange: exchange.refuse(500, None, "Broken.")
    with pytest.raises(ServerError):
        call("complete", prompt="p")
    assert len(api.asked("/stream")) == 1


def test_a_connection_lost_before_the_answer_is_repeated(api: FakeApi, call: Call) -> None:
    first = [True]

    def route(exchange: Exchange) -> None:
        if first.pop() if first else False:
            exchange.drop()
        else:
            say("ok")(exchange)

    api.routes["/stream"] = route
    assert call("complete", prompt="p").text == "ok"


def test_an_error_in_the_middle_keeps_what_came(api: FakeApi) -> None:
    def route(exchange: Exchange) -> None:
        exchange.start_stream({"X-Request-Id": "abc"})
        exchange.token(1, "half")
        exchange.write(b'event: error\ndata: {"error": {"message": "The engine failed.", "code": "engine_failed"}}\n\n')
        exchange.end_stream()

    api.routes["/stream"] = route
    documents = []
    with Client(api.url) as client, pytest.raises(StreamError, match="The engine failed") as raised:
        documents.extend(document for document in client.stream(prompt="p"))
    assert (raised.value.status, raised.value.code, raised.value.request_id) == (None, "engine_failed", "abc")
    assert len(api.asked("/stream")) == 1
    with Client(api.url) as client:
        assert next(client.stream(prompt="p")) == ModelOutputDocument(1, "half")


def start_then(end: Callable[[Exchange], None]) -> Callable[[Exchange], None]:
    def route(exchange: Exchange) -> None:
        exchange.start_stream()
        exchange.token(1, "half")
        end(exchange)

    return route


def test_an_answer_that_is_no_stream(api: FakeApi, call: Call) -> None:
    page = b"<html>Welcome!</html>"
    api.routes["/stream"] = lambda exchange: exchange.answer(200, page, {"Content-Type": "text/html"})
    for resume in (False, True):
        with pytest.raises(ServerError, match="did not answer with a stream; is this a serve_app"):
            call("complete", prompt="p", resume=resume)
    assert len(api.asked("/stream")) == 2


@pytest.mark.parametrize("end", [Exchange.drop, Exchange.end_stream], ids=["dropped", "ended without its last event"])
def test_a_stream_cut_short_is_an_error_and_not_an_answer(
    api: FakeApi, call: Call, end: Callable[[Exchange], None]
) -> None:
    api.routes["/stream"] = start_then(end)
    with pytest.raises(ConnectionLost):
        call("complete", prompt="p")
    assert len(api.asked("/stream")) == 1


@pytest.mark.parametrize(
    "data", [b"data: {\n\n", b"data: []\n\n", b'data: {"token_id": "x"}\n\n', b"event: done\ndata: {}\n\n"]
)
def test_a_garbled_event_is_an_error(api: FakeApi, call: Call, data: bytes) -> None:
    api.routes["/stream"] = start_then(lambda exchange: exchange.write(data))
    with pytest.raises(ServerError):
        call("complete", prompt="p")


def test_silence_is_bounded_and_not_repeated(api: FakeApi, call: Call) -> None:
    api.routes["/stream"] = lambda exchange: exchange.wait_until_gone() and None
    with pytest.raises(ConnectionLost, match="silent"):
        call("complete", {"timeout_s": 1}, prompt="p")
    deadline = time.monotonic() + 30
    while not api.asked("/stream"):  # the fake may have read it later than the client gave up
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(api.asked("/stream")) == 1


def test_no_server(api: FakeApi, call: Call) -> None:
    with pytest.raises(ConnectionLost, match=r"no server answers at http://127\.0\.0\.1:1"):
        call("complete", {"base_url": "http://127.0.0.1:1", "retries": 1}, prompt="p")


@pytest.mark.parametrize("address", ["", "localhost:8000", "ftp://host", "http://"])
def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises(ValueError, match="is not an address"):
        Client(address)
    with pytest.raises(ValueError, match="is not an address"):
        AsyncClient(address)


@pytest.fixture
def gone(api: FakeApi) -> Callable[[float], bool]:
    """Make /stream endless; returns a wait for the server seeing its client leave."""
    seen = threading.Event()

    def route(exchange: Exchange) -> None:
        exchange.start_stream()
        exchange.token(1, "endless")
        if exchange.wait_until_gone():
            seen.set()

    api.routes["/stream"] = route
    return seen.wait


def test_closing_a_stream_closes_its_connection(api: FakeApi, gone: Callable[[float], bool]) -> None:
    with Client(api.url) as client:
        with client.stream(prompt="p") as stream:
            next(stream)
        assert gone(60)
        stream.close()
        assert list(stream) == []


def test_leaving_the_loop_closes_the_connection(api: FakeApi, gone: Callable[[float], bool]) -> None:
    with Client(api.url) as client:
        for document in client.stream(prompt="p"):
            assert document.generated_text == "endless"
            break
        assert gone(60)


async def test_cancelling_the_task_closes_the_connection(api: FakeApi, gone: Callable[[float], bool]) -> None:
    started = asyncio.Event()

    async def read(client: AsyncClient) -> None:
        async for _ in client.stream(prompt="p"):
            started.set()

    async with AsyncClient(api.url) as client:
        task = asyncio.create_task(read(client))
        await asyncio.wait_for(started.wait(), 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(gone, 60)


async def test_closing_an_async_stream_closes_its_connection(api: FakeApi, gone: Callable[[float], bool]) -> None:
    async with AsyncClient(api.url) as client:
        async with client.stream(prompt="p") as stream:
            await anext(stream)
        assert await asyncio.to_thread(gone, 60)


def test_nothing_is_sent_before_the_first_document_is_asked_for(api: FakeApi) -> None:
    with Client(api.url) as client:
        client.stream(prompt="p").close()
    assert api.exchanges == []


def test_a_finished_stream_leaves_its_connection_for_the_next(api: FakeApi) -> None:
    with Client(api.url) as client:
        client.complete(prompt="p")
        client.complete(prompt="p")
    ports = {exchange._handler.client_address for exchange in api.exchanges}
    assert len(ports) == 1


def test_models(api: FakeApi, call: Call) -> None:
    (model,) = call("models")
    assert model.id == "fake-1"
    assert model.details["max_model_len"] == 2048


@pytest.mark.parametrize("body", [b"[]", b"{}", b"oops", b'{"data": [1]}', b'{"data": [{}]}'])
def test_models_of_something_else(api: FakeApi, call: Call, body: bytes) -> None:
    api.routes["/v1/models"] = lambda exchange: exchange.answer(200, body)
    with pytest.raises(ServerError):
        call("models")


ODD = [("ALL_PROXY", "socks://127.0.0.1:9"), ("HTTP_PROXY", "ftp://127.0.0.1:9"), ("NO_PROXY", "[::1")]


@pytest.mark.parametrize(("name", "value"), ODD)
def test_odd_proxy_settings_are_nothing_to_this_machine(
    api: FakeApi, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with Client(api.url) as client:
        assert client.ready().ready
    for url in ("http://127.8.0.1:8000", "http://[::1]:8000", "http://chat.localhost:8000"):
        Client(url).close()


@pytest.mark.parametrize(("name", "value"), ODD)
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_odd_proxy_settings_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, kind: type[Client | AsyncClient], name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=rf"proxy settings of the environment \(.*{name}.*\) can't be used: "):
        kind("http://198.51.100.7:8000")


def test_a_proxy_that_has_no_application_yet_is_no_failure() -> None:
    """`serve-app serve` and `wait_until_ready` go on waiting; only the application's own word ends that."""
    answer = {"error": {"message": "The service is starting.", "type": "server_error", "code": "not_ready"}}
    state = read_readiness(503, json.dumps(answer).encode())
    assert (state.ready, state.stage, state.error) == (False, "", None)
    failed = read_readiness(503, json.dumps({"status": "failed", "stage": "failed", "error": "No space."}).encode())
    assert failed.error == "No space."


def test_a_name_that_the_server_does_not_answer_to_is_said() -> None:
    answer = {"error": {"message": "This service does not answer to the host 'x'.", "code": "host_not_allowed"}}
    with pytest.raises(PermissionDenied, match="does not answer to the host"):
        read_readiness(403, json.dumps(answer).encode())


@pytest.mark.parametrize(
    ("settings", "variable", "sent"),
    [
        ({"api_key": "sa-mine"}, "sa-env", "Bearer sa-mine"),
        ({}, " sa-env\n", "Bearer sa-env"),
        ({}, "", None),
        ({"api_key": ""}, "sa-env", None),
        ({"api_key": "sa-mine", "headers": {"authorization": "Bearer other"}}, "", "Bearer other"),
        ({"headers": {"X-Api-Key": "sa-mine"}}, "sa-env", None),
    ],
)
def test_the_key_that_is_sent(
    api: FakeApi, call: Call, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], variable: str, sent: str | None
) -> None:
    monkeypatch.setenv("SERVE_APP_API_KEY", variable)
    api.routes["/stream"] = say("Hi")
    call("complete", settings, prompt="p")
    (asked,) = api.asked("/stream")
    assert asked.headers.get("authorization") == sent


@pytest.mark.parametrize("method", ["models", "ready", "complete"])
@pytest.mark.parametrize(("status", "kind"), [(401, AuthenticationError), (403, PermissionDenied)])
def test_a_key_that_is_refused(api: FakeApi, call: Call, method: str, status: int, kind: type[BadRequest]) -> None:
    for path in ("/v1/models", "/ready", "/stream"):
        api.routes[path] = lambda exchange: exchange.refuse(status, "invalid_api_key", "It is wrong.")
    with pytest.raises(kind, match="It is wrong") as error:
        call(method, **({"prompt": "p"} if method == "complete" else {}))
    assert (error.value.status, error.value.code) == (status, "invalid_api_key")
