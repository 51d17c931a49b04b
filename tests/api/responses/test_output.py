"""Calls, reasoning and text as items and events, and what the next turn's model reads of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest
from fake_replica import FakeReplica, Script, card
from redis_server import redis_server
from responses_api import create, events_of, text_of
from small_tokenizers import CHATML, chat_tokenizer
from starlette.applications import Starlette

from serve_app.api.responses.output import Logprob, Output
from serve_app.api.responses.writer import ResponseWriter
from serve_app.chat.parts import ArgumentsPart, CallPart, ReasoningPart, TextPart
from serve_app.chat.tokenizer import ChatTokenizer
from serve_app.generation.text import TokenLogprob
from serve_app.resume.journal_store import JournalLimits
from serve_app.resume.memory_store import MemoryJournalStore
from serve_app.resume.redis_store import RedisJournalStore

MakeApp = Callable[..., Starlette]
Http = Callable[[Starlette], httpx.AsyncClient]
Writes = Callable[..., Script]
Event = dict[str, Any]

TOOLS = [
    {
        "type": "function",
        "name": name,
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    }
    for name in ("get_weather", "get_time")
]
CALLS = "".join(
    f'<tool_call>\n{{"name": "{name}", "arguments": {{"city": "R\\u00f6me 🙂"}}}}\n</tool_call>\n'
    for name in ("get_weather", "get_time")
)
THINKS = (
    "{% for m in messages %}{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{% endfor %}" + CHATML
)
"""A template that shows earlier reasoning."""


@pytest.fixture
def calling(writes: Writes, tokenizer: ChatTokenizer) -> FakeReplica:
    state = card(vocab_size=tokenizer.vocab_size, context_tokens=4096)
    return FakeReplica([writes(f"I look.\n{CALLS}"), writes("Warm.")], state=state)


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return chat_tokenizer(tmp_path_factory.mktemp("thinker"), THINKS)


def items_of(output: Output, open_status: str = "never") -> list[Event]:
    items: list[Event] = json.loads(output.items(open_status))
    return items


def test_parts_become_items_and_events() -> None:
    output = Output("resp_" + "a" * 22)
    told = output.add([ReasoningPart("Hm"), ReasoningPart("."), TextPart("I "), TextPart("look.")], [])
    told += output.add([CallPart(0, "f"), ArgumentsPart(0, '{"a"'), ArgumentsPart(0, ": 1}"), CallPart(1, "g")], [])
    assert [item["status"] for item in items_of(output, "in_progress")] == ["completed"] * 3 + ["in_progress"]
    told += output.end("incomplete")
    reasoning, message, first, second = items_of(output)
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Hm."}]
    assert message["content"][0]["text"] == "I look."
    assert (first["name"], first["arguments"], first["status"]) == ("f", '{"a": 1}', "completed")
    assert (second["name"], second["arguments"], second["status"]) == ("g", "", "incomplete")
    assert len({item["id"] for item in (reasoning, message, first, second)}) == 4
    assert len({first["call_id"], second["call_id"]}) == 2
    kinds = [kind.removeprefix("response.") for kind, _ in told]
    assert kinds == [
        *("output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.delta"),
        *("reasoning_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.delta"),
        *("function_call_arguments.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.done", "output_item.done"),
    ]


def test_logprobs_belong_to_text_alone() -> None:
    def logprob(token: str) -> Logprob:
        return Logprob(f'{{"token": "{token}"}}', "")

    output = Output("resp_" + "a" * 22)
    output.add([], [logprob("<think>")])
    output.add([ReasoningPart("Hm")], [logprob("Hm")])
    output.add([], [logprob("wa")])
    output.add([TextPart("warm")], [logprob("rm")])
    output.add([], [logprob("!")])
    output.end("completed")
    _, message = items_of(output)
    assert [each["token"] for each in message["content"][0]["logprobs"]] == ["wa", "rm", "!"]


async def test_many_logprobs_are_written_once_and_not_in_the_event_loop(
    replica: FakeReplica, make_app: MakeApp, http: Http, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    threads: list[bool] = []
    in_thread, write = asyncio.to_thread, ResponseWriter._logprob

    def counted(writer: ResponseWriter, token: TokenLogprob) -> Logprob:
        written.append(token.token_id)
        return write(writer, token)

    async def to_thread(*work: Any) -> Any:
        threads.append(True)
        return await in_thread(*work)

    monkeypatch.setattr(ResponseWriter, "_logprob", counted)
    api = http(make_app(replica))
    response = await api.post("/v1/responses", json={"input": "Hi", "top_logprobs": 2, "stream": True})
    document = events_of(response.content)[-1]["response"]
    logprobs = document["output"][0]["content"][0]["logprobs"]
    assert len(written) == len(logprobs)
    monkeypatch.setattr(asyncio, "to_thread", to_thread)
    monkeypatch.setattr("serve_app.api.responses.kept.INLINE_ENTRIES", 2 * len(logprobs))
    assert (await api.get(f"/v1/responses/{document['id']}")).json() == document
    assert threads
    second = await create(api, previous_response_id=document["id"])
    items = (await api.get(f"/v1/responses/{second['id']}/input_items")).json()["data"]
    assert [item["content"][0].get("logprobs") for item in items if item["role"] == "assistant"] == [[]]


@pytest.mark.parametrize("store", [True, False])
@pytest.mark.parametrize("stream", [True, False])
async def test_calls_are_items(calling: FakeReplica, make_app: MakeApp, http: Http, store: bool, stream: bool) -> None:
    body = {"input": "Weather in Rome?", "tools": TOOLS, "store": store, "stream": stream}
    response = await http(make_app(calling)).post("/v1/responses", json=body)
    document = events_of(response.content)[-1]["response"] if stream else response.json()
    assert text_of(document) == "I look."
    assert document["status"] == "completed"
    _, first, second = document["output"]
    assert [item["type"] for item in (first, second)] == ["function_call"] * 2
    assert json.loads(first["arguments"]) == json.loads(second["arguments"]) == {"city": "Röme 🙂"}
    assert first["call_id"] != second["call_id"]
    assert [tool["strict"] for tool in document["tools"]] == [False, False]


async def test_the_results_of_calls_are_the_next_turn(
    calling: FakeReplica, make_app: MakeApp, http: Http, tokenizer: ChatTokenizer
) -> None:
    api = http(make_app(calling))
    asked = await create(api, input="Weather in Rome?", tools=TOOLS)
    _, first, second = asked["output"]
    results = [
        {"type": "function_call_output", "call_id": call["call_id"], "output": f"{n} degrees"}
        for n, call in enumerate((first, second), 20)
    ]
    answer = await create(api, input=results, previous_response_id=asked["id"], tools=TOOLS)
    assert text_of(answer) == "Warm."
    await create(api, input=[{"role": "user", "content": "Weather in Rome?"}, *asked["output"], *results], tools=TOOLS)
    by_id, by_hand = calling.requests[-2:]
    assert by_id.prompt_token_ids == by_hand.prompt_token_ids
    prompt = tokenizer.decode(list(by_id.prompt_token_ids))
    assert prompt.index("get_weather") < prompt.index("20 degrees") < prompt.index("21 degrees")
    listed = (await api.get(f"/v1/responses/{answer['id']}/input_items?order=asc")).json()["data"]
    assert [item["type"] for item in listed] == [
        "message",
        "message",
        *["function_call"] * 2,
        *["function_call_output"] * 2,
    ]


async def test_reasoning_is_an_item_that_the_next_turn_reads(
    make_app: MakeApp, http: Http, writes: Writes, thinker: ChatTokenizer
) -> None:
    replica = FakeReplica(
        [writes("<think>\nHm, a greeting.\n</think>\n\nHello!"), writes("Yes.")],
        state=card(vocab_size=thinker.vocab_size),
    )
    api = http(make_app(replica, text=thinker))
    streamed = events_of((await api.post("/v1/responses", json={"input": "Hi", "stream": True})).content)
    first = streamed[-1]["response"]
    reasoning, message = first["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Hm, a greeting."}]
    assert message["content"][0]["text"] == "Hello!"
    details = first["usage"]["output_tokens_details"]
    assert 0 < details["reasoning_tokens"] < first["usage"]["output_tokens"]
    text = "".join(event["delta"] for event in streamed if event["type"] == "response.reasoning_text.delta")
    assert text == "Hm, a greeting."
    await create(api, input="Sure?", previous_response_id=first["id"])
    assert "<think>Hm, a greeting.</think>" in thinker.decode(list(replica.requests[-1].prompt_token_ids))


async def test_reasoning_that_a_template_does_not_read_is_named(api: httpx.AsyncClient) -> None:
    reasoning = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]}
    items = [
        {"role": "user", "content": "Hi"},
        reasoning,
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Again"},
    ]
    response = await api.post("/v1/responses", json={"input": items})
    assert response.status_code == 200
    assert response.headers["x-ignored-fields"] == "input[].reasoning_content"


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    with redis_server() as url:
        yield url


@pytest.fixture(params=["memory", "redis"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[MemoryJournalStore | RedisJournalStore]:
    if request.param == "memory":
        yield MemoryJournalStore(JournalLimits())
        return
    made = RedisJournalStore(request.getfixturevalue("redis_url"), JournalLimits(), "responses")
    yield made
    await made.aclose()


async def test_a_store_of_any_kind_keeps_them_for_all(
    calling: FakeReplica, make_app: MakeApp, http: Http, store: MemoryJournalStore | RedisJournalStore
) -> None:
    api, other = http(make_app(calling, kept=store)), http(make_app(calling, kept=store))
    first = await create(api, input="Weather in Rome?", tools=TOOLS)
    path = f"/v1/responses/{first['id']}"
    assert (await other.get(path)).json() == first
    calling.scripts = [lambda request: [None]]
    begun = await create(api, background=True)
    assert (await other.post(f"/v1/responses/{begun['id']}/cancel")).json()["status"] == "cancelled"
    assert (await other.delete(path)).status_code == 200
    assert (await api.get(path)).status_code == 404
