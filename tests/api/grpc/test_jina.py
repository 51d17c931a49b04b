"""What Jina's client sends, recorded (Jina 3.34 with DocArray 0.40), and what it needs in the answers."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import httpx
import pytest
from fake_replica import FakeReplica, Script
from grpc_server import grpc_server
from starlette.applications import Starlette

from serve_app.api.grpc.servicer import Servicer
from serve_app.api.grpc.services import STREAM_DOC
from serve_app.core import Failure, FailureCode
from serve_app.proto.jina_pb2 import DocProto, HeaderProto, ListOfAnyProto, NodeProto, SingleDocumentRequestProto

MakeApp = Callable[..., Starlette]
ANSWER = "The quick brown fox says 🙂 and naïve."
OVER_GRPC = (
    b"\n+\n d400d9ba4ae2457b8f6a5a7d0dde310f\x1a\x07/stream"
    b'"m\n,\n\x02id\x12&\n 307a775f960370fc96dc5bf978df4745j\x02id\n\x10\n\nmax_tokens\x12\x02\x10\n'
    b"\n+\n\x06prompt\x12!\n\x1fwhat is the capital of France ?"
)
"""`stream_doc(on="/stream", inputs=PromptDocument(prompt="what is the capital of France ?", max_tokens=10))`."""
OVER_HTTP = b'{"id": "79ed54fa19353da321f010eb4ceacd1c", "prompt": "what is the capital of France ?", "max_tokens": 10}'
HTTP_HEADERS = {"Accept": "text/event-stream", "Content-Type": "application/json", "Accept-Encoding": "gzip, deflate"}


@pytest.fixture
async def call(replica: FakeReplica, make_app: MakeApp) -> AsyncIterator[Callable[[bytes], Any]]:
    """call(request) -> the answers."""
    async with (
        grpc_server(Servicer(make_app(replica), replica.model)) as target,
        grpc.aio.insecure_channel(target) as channel,
    ):
        method = channel.unary_stream(STREAM_DOC, response_deserializer=SingleDocumentRequestProto.FromString)
        yield lambda request: method(request, timeout=60)


MANY = NodeProto(list=ListOfAnyProto(data=[NodeProto()] * 40_000))


def document(**fields: Any) -> bytes:
    data = {name: value if isinstance(value, NodeProto) else NodeProto(text=value) for name, value in fields.items()}
    header = HeaderProto(request_id="r1", exec_endpoint="/stream")
    return SingleDocumentRequestProto(header=header, document=DocProto(data=data)).SerializeToString(deterministic=True)


async def test_the_recorded_request_is_answered_document_by_document(call: Any, replica: FakeReplica) -> None:
    answers = [answer async for answer in call(OVER_GRPC)]
    assert replica.requests[0].max_new_tokens == 10
    assert len(answers) == 10
    assert {answer.header.request_id for answer in answers} == {"d400d9ba4ae2457b8f6a5a7d0dde310f"}
    data = [answer.document.data for answer in answers]
    assert all(set(each) == {"id", "token_id", "generated_text"} for each in data)
    assert ANSWER.startswith("".join(each["generated_text"].text for each in data))
    assert all(each["id"].type == "id" and each["token_id"].WhichOneof("content") == "integer" for each in data)
    assert len({each["id"].text for each in data}) == len(data)


async def test_all_fields_are_taken(call: Any, replica: FakeReplica) -> None:
    stops = ListOfAnyProto(data=[NodeProto(text="#"), NodeProto(text="brown")])
    request = document(
        prompt="Hi",
        temperature=NodeProto(number=0.5),
        top_k=NodeProto(integer=3),
        parse_special=NodeProto(boolean=True),
        stop=NodeProto(list=stops),
        seed=NodeProto(),  # None
    )
    answers = [answer async for answer in call(request)]
    sampling = replica.requests[0].sampling
    assert (sampling.temperature, sampling.top_k) == (0.5, 3)
    text = "".join(answer.document.data["generated_text"].text for answer in answers)
    assert text == "The quick "


async def test_answers_repeat_no_more_of_the_header_than_is_known(call: Any) -> None:
    """A field that is not in our .proto would else come back with every token."""
    header = HeaderProto.FromString(
        HeaderProto(request_id="r1", exec_endpoint="/stream").SerializeToString() + b"\x28\x09"
    )
    document = DocProto(data={"prompt": NodeProto(text="Hi"), "max_tokens": NodeProto(integer=1)})
    [answer] = [
        each async for each in call(SingleDocumentRequestProto(header=header, document=document).SerializeToString())
    ]
    assert (
        answer.header.SerializeToString() == HeaderProto(request_id="r1", exec_endpoint="/stream").SerializeToString()
    )


@pytest.mark.parametrize(
    ("request_", "status", "code"),
    [
        (document(), grpc.StatusCode.INVALID_ARGUMENT, "invalid_value"),
        (document(prompt="a", surprise="b"), grpc.StatusCode.INVALID_ARGUMENT, "unknown_parameter"),
        (document(prompt="a", max_tokens="ten"), grpc.StatusCode.INVALID_ARGUMENT, "invalid_type"),
        (document(prompt=NodeProto.FromString(b"\x2a\x01x")), grpc.StatusCode.INVALID_ARGUMENT, "invalid_type"),
        (OVER_GRPC.replace(b"/stream", b"/streem"), grpc.StatusCode.NOT_FOUND, "not_found"),
        (document(prompt="a", stop=MANY), grpc.StatusCode.INVALID_ARGUMENT, "invalid_value"),
        (document(**{str(n): "a" for n in range(9000)}), grpc.StatusCode.INVALID_ARGUMENT, "invalid_value"),
        (
            OVER_GRPC.replace(b"\n+\n ", b"\n\xac\x02\n\xa0\x02" + b"i" * 256),
            grpc.StatusCode.INVALID_ARGUMENT,
            "invalid_value",
        ),
        (OVER_GRPC[:-1], grpc.StatusCode.INVALID_ARGUMENT, "invalid_protobuf"),
    ],
)
async def test_what_is_wrong_is_said(call: Any, request_: bytes, status: grpc.StatusCode, code: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        [_ async for _ in call(request_)]
    assert (refused.value.code(), json.loads(refused.value.details() or "")["error"]["code"]) == (status, code)


def as_jinas_client_reads(chunks: list[bytes]) -> list[dict[str, Any]]:
    """`HTTPClientlet.send_streaming_message` and `HTTPBaseClient._get_streaming_results`."""
    documents = []
    for chunk in chunks:
        for event in chunk.split(b"event: ")[1:]:
            if event.startswith(b"update"):
                documents.append(json.loads(event[14:].decode()))
    return documents


async def test_the_recorded_http_request(api: httpx.AsyncClient, replica: FakeReplica) -> None:
    response = await api.request("GET", "/stream", content=OVER_HTTP, headers=HTTP_HEADERS | {"x-request-id": "r9"})
    assert response.headers["content-type"].startswith("text/event-stream")
    documents = as_jinas_client_reads([response.content])
    assert replica.requests[0].max_new_tokens == len(documents) == 10
    assert [document["id"] for document in documents] == [f"r9-{number}" for number in range(10)]
    assert ANSWER.startswith("".join(document["generated_text"] for document in documents))
    last = response.text.split("event: ")[-1]
    assert last.startswith("end\r\ndata: {")
    assert json.loads(last.removeprefix("end\r\ndata: "))["usage"]["completion_tokens"] == 10


async def test_text_that_looks_like_an_event(
    api: httpx.AsyncClient, replica: FakeReplica, writes: Callable[..., Script]
) -> None:
    replica.scripts[:] = [writes("an event: update", batch=99)]
    response = await api.request("GET", "/stream", content=b'{"prompt": "Hi"}')
    documents = as_jinas_client_reads([response.content])
    assert "".join(document["generated_text"] for document in documents) == "an event: update"


async def test_an_error_in_the_stream_is_an_event(
    api: httpx.AsyncClient, replica: FakeReplica, writes: Callable[..., Script]
) -> None:
    replica.scripts[:] = [writes("The", end=Failure(FailureCode.POISON, "It kills."))]
    response = await api.request("GET", "/stream", content=b'{"prompt": "Hi"}')
    last = response.text.split("event: ")[-1]
    assert json.loads(last.removeprefix("error\r\ndata: "))["error"]["code"] == "request_killed_replica"


@pytest.mark.parametrize(
    ("query", "content", "code"),
    [
        ("?prompt=Hi", b'{"prompt": "Hi"}', "invalid_value"),
        ("", b"{", "invalid_json"),
        ("", b"[]", "invalid_json"),
        ("", b'{"prompt": "Hi", "surprise": 1}', "unknown_parameter"),
    ],
)
async def test_a_wrong_body_of_a_get(api: httpx.AsyncClient, query: str, content: bytes, code: str) -> None:
    response = await api.request("GET", f"/stream{query}", content=content)
    assert (response.status_code, response.json()["error"]["code"]) == (400, code)


async def test_the_stream_can_be_resumed(api: httpx.AsyncClient) -> None:
    headers = {"X-Stream-Resume": "1", "x-request-id": "r8"}
    whole = await api.request("GET", "/stream", content=OVER_HTTP, headers=headers)
    first = next(line for line in whole.text.splitlines() if line.startswith("id: "))
    rest = await api.get(f"/v1/streams/{whole.headers['x-stream-id']}", headers={"Last-Event-ID": first[4:]})
    assert rest.status_code == 200
    events = whole.text.split("\r\n\r\n")
    assert rest.text.split("\r\n\r\n")[1:] == events[2:]


async def test_a_get_with_a_body_elsewhere_is_answered_as_without(api: httpx.AsyncClient) -> None:
    assert (await api.request("GET", "/v1/models", content=b"{")).status_code == 200
