"""POST /v1/messages: Anthropic's documents and events, whole, streamed and resumed."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Callable
from hashlib import sha256
from typing import Any

import httpx
import pytest
from fake_replica import ALIVE, FakeReplica, Script, card, says, tokens
from starlette.applications import Starlette

from serve_app.chat.tokenizer import ChatTokenizer
from serve_app.core import Failure, FailureCode, FinishReason

ANSWER = "The quick brown fox says 🙂 and naïve."
HI: dict[str, Any] = {"model": "tiny", "max_tokens": 100, "messages": [{"role": "user", "content": "Hi"}]}
URL = "/v1/messages"
THOUGHT = "Hm, a greeting."
THINKS = f"<think>\n{THOUGHT}\n</think>\n\nHello!"
SIGNED = b64encode(sha256(THOUGHT.encode()).digest()).decode()
Thinking = Callable[..., tuple[httpx.AsyncClient, FakeReplica]]


def events(text: str) -> list[dict[str, Any]]:
    """The data of a stream's events; the name of each is its type."""
    *blocks, rest = text.split("\n\n")
    assert rest == ""
    found = []
    for block in blocks:
        lines = [line for line in block.splitlines() if line and not line.startswith(("id: ", "retry: ", ": ping"))]
        name, data = lines
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    return found


def replayed(stream: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a client makes of the events, as Anthropic's own clients do."""
    start, *middle, last, stop = stream
    assert (start["type"], last["type"], stop) == ("message_start", "message_delta", {"type": "message_stop"})
    message: dict[str, Any] = start["message"]
    arguments = ""
    for event in middle:
        if event["type"] == "content_block_start":
            assert event["index"] == len(message["content"])
            message["content"].append(event["content_block"])
            arguments = ""
            continue
        assert event["index"] == len(message["content"]) - 1
        block = message["content"][-1]
        if event["type"] == "content_block_stop":
            if arguments:
                block["input"] = json.loads(arguments)
            continue
        delta = event["delta"]
        match delta["type"]:
            case "text_delta":
                assert delta["text"]
                block["text"] += delta["text"]
            case "thinking_delta":
                block["thinking"] += delta["thinking"]
            case "signature_delta":
                block["signature"] = delta["signature"]
            case "input_json_delta":
                arguments += delta["partial_json"]
    message.update(last["delta"])
    message["usage"].update(last["usage"])
    return message


async def both(api: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    """The answer without its id, which must be the same whole, streamed and resumable."""
    whole = (await api.post(URL, json={**body, "seed": 7})).json()
    for headers in ({}, {"x-stream-resume": "1"}):
        response = await api.post(URL, json={**body, "seed": 7, "stream": True}, headers=headers)
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        message = replayed(events(response.text))
        for answer in (message, dict(whole)):
            for block in answer["content"]:
                if block["type"] == "tool_use":
                    assert block["id"].startswith("toolu_")
        ids = (message.pop("id"), whole["id"])
        assert all(answer_id.startswith("msg_") for answer_id in ids)
        assert without_ids(message) == without_ids(whole)
    return without_ids(whole)


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    content = [{name: value for name, value in block.items() if name != "id"} for block in message["content"]]
    return {name: value for name, value in message.items() if name != "id"} | {"content": content}


async def test_the_whole_message(api: httpx.AsyncClient, replica: FakeReplica) -> None:
    response = await api.post(URL, json={**HI, "seed": 3})
    assert response.status_code == 200
    assert response.headers["x-seed"] == "3"
    assert response.headers["request-id"] == response.headers["x-request-id"]
    body = response.json()
    output_tokens = body["usage"]["output_tokens"]
    assert body.pop("id").startswith("msg_")
    assert body == {
        "type": "message",
        "role": "assistant",
        "model": "tiny",
        "content": [{"type": "text", "text": ANSWER}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "stop_details": None,
        "container": None,
        "usage": {
            "input_tokens": len(replica.requests[0].prompt_token_ids) - 2,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 2,
            "output_tokens": output_tokens,
            "output_tokens_details": {"thinking_tokens": 0},
            "service_tier": "standard",
        },
    }
    assert output_tokens > 5


async def test_streamed_and_resumed_it_is_the_same(api: httpx.AsyncClient) -> None:
    message = await both(api, HI)
    assert message["content"] == [{"type": "text", "text": ANSWER}]


async def test_every_event_in_order(api: httpx.AsyncClient, replica: FakeReplica) -> None:
    stream = events((await api.post(URL, json={**HI, "stream": True})).text)
    assert [event["type"] for event in stream[:3]] == ["message_start", "content_block_start", "content_block_delta"]
    assert [event["type"] for event in stream[-3:]] == ["content_block_stop", "message_delta", "message_stop"]
    start = stream[0]["message"]
    assert (start["content"], start["stop_reason"]) == ([], None)
    assert start["usage"]["input_tokens"] == len(replica.requests[0].prompt_token_ids)
    assert start["usage"]["output_tokens"] == 0
    assert stream[-2]["usage"]["cache_read_input_tokens"] == 2


@pytest.mark.parametrize(
    ("asked", "reason", "hit"),
    [
        ({"max_tokens": 3}, "max_tokens", None),
        ({"stop_sequences": ["xyz", " fox"]}, "stop_sequence", " fox"),
        ({"stop_sequences": []}, "end_turn", None),
    ],
)
async def test_why_it_stopped(api: httpx.AsyncClient, asked: dict[str, Any], reason: str, hit: str | None) -> None:
    message = await both(api, {**HI, **asked})
    assert (message["stop_reason"], message["stop_sequence"]) == (reason, hit)
    if hit:
        assert message["content"] == [{"type": "text", "text": "The quick brown"}]


async def test_a_limit_that_the_context_cuts(
    replica: FakeReplica, make_app: Callable[..., Starlette], http: Callable[..., httpx.AsyncClient], tokenizer: Any
) -> None:
    replica.state = card(vocab_size=tokenizer.vocab_size, context_tokens=40)
    response = await http(make_app(replica)).post(URL, json={**HI, "max_tokens": 32_000})
    room = 40 - len(replica.requests[0].prompt_token_ids)
    assert response.headers["x-clamped-fields"] == f"max_tokens={room}"
    assert replica.requests[0].max_new_tokens == room
    body = response.json()
    assert body["stop_reason"] in ("end_turn", "model_context_window_exceeded")
    replica.scripts = [says(tokens(0, 84, 85, finish=FinishReason.LENGTH))]
    body = (await http(make_app(replica)).post(URL, json={**HI, "max_tokens": 32_000})).json()
    assert body["stop_reason"] == "model_context_window_exceeded"


async def test_an_answer_without_any_text(api: httpx.AsyncClient, replica: FakeReplica, eos: int) -> None:
    replica.scripts = [says(tokens(0, eos, finish=FinishReason.STOP))]
    message = await both(api, HI)
    assert (message["content"], message["stop_reason"]) == ([], "end_turn")


@pytest.mark.parametrize("batch", [1, 4, 100])
async def test_thinking_is_a_block_of_its_own(thinking: Thinking, batch: int) -> None:
    api, _ = thinking(THINKS, batch=batch)
    message = await both(api, HI)
    assert message["content"] == [
        {"type": "thinking", "thinking": THOUGHT, "signature": SIGNED},
        {"type": "text", "text": "Hello!"},
    ]
    assert 0 < message["usage"]["output_tokens_details"]["thinking_tokens"] < message["usage"]["output_tokens"]


async def test_thinking_can_be_left_out(thinking: Thinking) -> None:
    api, _ = thinking(THINKS)
    message = await both(api, {**HI, "thinking": {"type": "adaptive", "display": "omitted"}})
    assert message["content"][0] == {"type": "thinking", "thinking": "", "signature": SIGNED}


@pytest.mark.parametrize(
    ("asked", "end", "ignored"),
    [
        (None, "assistant\n", ""),
        ({"type": "enabled", "budget_tokens": 1024}, "assistant\n", "thinking.budget_tokens"),
        ({"type": "disabled"}, "<think>\n\n</think>\n\n", ""),
        ({"type": "adaptive"}, "assistant\n", ""),
    ],
)
async def test_the_templates_switch(
    thinking: Thinking, thinker: ChatTokenizer, asked: dict[str, Any] | None, end: str, ignored: str
) -> None:
    api, replica = thinking("Hello!")
    response = await api.post(URL, json={**HI, **({"thinking": asked} if asked else {})})
    assert response.status_code == 200
    assert thinker.shown(replica.requests[0].prompt_token_ids).endswith(end)
    assert response.headers.get("x-ignored-fields", "") == ignored
    assert response.json()["content"] == [{"type": "text", "text": "Hello!"}]


async def test_a_template_without_a_switch_is_told(api: httpx.AsyncClient) -> None:
    body = {**HI, "thinking": {"type": "enabled", "budget_tokens": 5000}, "output_config": {"effort": "high"}}
    response = await api.post(URL, json=body)
    assert response.headers["x-ignored-fields"] == "thinking.budget_tokens, thinking, output_config.effort"


@pytest.mark.usefixtures("calling")
async def test_calls_are_blocks_with_input(thinking: Thinking) -> None:
    api, _ = thinking('[think:Which?]Let me see. [weather({"city": "Rome", "days": 2})][time({})]')
    message = await both(api, HI)
    thought, *rest = message["content"]
    assert (thought["type"], thought["thinking"]) == ("thinking", "Which?")
    assert rest == [
        {"type": "text", "text": "Let me see. "},
        {"type": "tool_use", "name": "weather", "input": {"city": "Rome", "days": 2}},
        {"type": "tool_use", "name": "time", "input": {}},
    ]
    assert (message["stop_reason"], message["stop_sequence"]) == ("tool_use", None)


@pytest.mark.usefixtures("calling")
async def test_ids_of_calls_are_functions_of_the_answer(thinking: Thinking) -> None:
    api, _ = thinking("[a({})][b({})]")
    first = (await api.post(URL, json=HI)).json()
    second = (await api.post(URL, json=HI)).json()
    ids = [block["id"] for answer in (first, second) for block in answer["content"]]
    assert len(set(ids)) == 4


@pytest.mark.usefixtures("calling")
async def test_a_call_that_the_limit_cut_has_what_is_whole(thinking: Thinking) -> None:
    api, _ = thinking('[weather({"city": "Rome", "days')
    body = (await api.post(URL, json=HI)).json()
    assert body["content"][0]["input"] == {"city": "Rome"}


async def test_every_sampling_field_reaches_the_replica(api: httpx.AsyncClient, replica: FakeReplica) -> None:
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 40, "seed": 11, "min_p": 0.1, "cache_salt": "mine"}
    assert (await api.post(URL, json={**HI, **fields})).status_code == 200
    (request,) = replica.requests
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.5, 0.9, 40, 11)
    assert (sampling.min_p, request.cache_salt, request.max_new_tokens) == (0.1, "mine", 100)


async def test_fields_that_change_nothing_are_taken(api: httpx.AsyncClient) -> None:
    marked = {"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral", "ttl": "1h"}, "citations": None}
    body = {
        **HI,
        "messages": [{"role": "user", "content": [marked]}],
        "system": [marked],
        "metadata": {"user_id": "u"},
        "service_tier": "auto",
        "cache_control": {"type": "ephemeral"},
        "container": None,
        "mcp_servers": [],
        "tools": [],
        "tool_choice": {"type": "auto"},
        "context_management": {"edits": []},
    }
    response = await api.post(URL, json=body, headers={"anthropic-version": "2023-06-01", "anthropic-beta": "x-1,y-2"})
    assert response.status_code == 200, response.text
    assert "x-ignored-fields" not in response.headers


async def test_what_is_ignored_is_named(api: httpx.AsyncClient) -> None:
    body = {
        **HI,
        "speed": "fast",
        "inference_geo": "eu",
        "diagnostics": {"previous_message_id": "msg_1"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi", "colour": "red"}], "name": "Bo"}],
    }
    response = await api.post(URL, json=body)
    assert response.status_code == 200
    assert response.headers["x-ignored-fields"] == (
        "speed, inference_geo, diagnostics, context_management.edits[], messages[].name, messages[].content[].colour"
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": "100"}, "max_tokens"),
        ({"temperature": 1.5}, "temperature"),
        ({"stop_sequences": [1]}, "stop_sequences"),
        ({"thinking": {"type": "sometimes"}}, "thinking.type"),
        ({"thinking": "enabled"}, "thinking"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "tool", "name": "f"}}, "tool_choice"),
        ({"container": "c"}, "container"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management.edits[0]"),
        ({"context_management": {"edits": 7}}, "context_management.edits"),
        ({"thread": {"type": "create"}}, "thread"),
        ({"stop": ["x"]}, "stop"),
        ({"n": 2}, "n"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"guided_json": {"type": "object"}}, "guided_json"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type"),
        ({"system": 7}, "system"),
        ({"system": [{"type": "image"}]}, "system[0]"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": ["Hi"]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "Hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"text": "Hi"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use"}]}]}, "messages[0].content[0]"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_bad_fields_are_refused_by_name(
    api: httpx.AsyncClient, replica: FakeReplica, changes: dict[str, Any], named: str, stream: bool
) -> None:
    response = await api.post(URL, json={**HI, **changes, "stream": stream})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert named in error["message"]
    assert not replica.requests


async def test_an_unknown_field_is_refused_where_the_config_says_so(
    replica: FakeReplica, make_app: Callable[..., Starlette], http: Callable[..., httpx.AsyncClient]
) -> None:
    response = await http(make_app(replica, unknown_fields="refuse")).post(URL, json={**HI, "speed": "fast"})
    assert response.status_code == 400
    assert "'speed'" in response.json()["error"]["message"]


async def test_the_assistants_last_message_is_continued(
    api: httpx.AsyncClient, replica: FakeReplica, tokenizer: ChatTokenizer
) -> None:
    turns = [*HI["messages"], {"role": "assistant", "content": [{"type": "text", "text": "My answer is ("}]}]
    assert (await api.post(URL, json={**HI, "messages": turns})).status_code == 200
    assert tokenizer.shown(replica.requests[0].prompt_token_ids).endswith("<|im_start|>assistant\nMy answer is (")


async def test_the_prompt_that_becomes_of_a_conversation(
    api: httpx.AsyncClient, replica: FakeReplica, tokenizer: ChatTokenizer
) -> None:
    body = {
        **HI,
        "system": [{"type": "text", "text": "x-anthropic-billing-header: cch=1"}, {"type": "text", "text": "Be kind."}],
        "messages": [
            {"role": "user", "content": "One"},
            {"role": "user", "content": [{"type": "text", "text": "Two"}]},
            {"role": "assistant", "content": "Three"},
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Four"},
        ],
    }
    assert (await api.post(URL, json=body)).status_code == 200
    assert tokenizer.shown(replica.requests[0].prompt_token_ids) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nOne\nTwo<|im_end|>\n"
        "<|im_start|>assistant\nThree<|im_end|>\n<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nFour<|im_end|>\n<|im_start|>assistant\n"
    )


async def test_a_template_that_takes_a_system_message_only_at_the_front(
    strict: ChatTokenizer, writes: Callable[..., Script], make_app: Any, http: Any
) -> None:
    replica = FakeReplica([writes()], state=card(vocab_size=strict.vocab_size))
    api = http(make_app(replica, text=strict))
    turns = [
        {"role": "user", "content": "One"},
        {"role": "system", "content": "Be brief."},
        {"role": "assistant", "content": "Two"},
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Three"},
    ]
    response = await api.post(URL, json={**HI, "system": "S", "messages": turns})
    assert response.status_code == 200, response.text
    assert strict.shown(replica.requests[0].prompt_token_ids) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nOne\nBe brief.<|im_end|>\n"
        "<|im_start|>assistant\nTwo<|im_end|>\n<|im_start|>user\nBe kind.\nThree<|im_end|>\n<|im_start|>assistant\n"
    )
    response = await api.post(URL, json={**HI, "messages": [*turns, {"role": "user", "content": "refuse me"}]})
    assert "no thanks" in response.json()["error"]["message"]


async def test_an_error_in_the_middle_of_a_stream(api: httpx.AsyncClient, replica: FakeReplica) -> None:
    replica.scripts = [says(tokens(0, 84), 0.02, Failure(FailureCode.ENGINE_FAILED, "It broke."))]
    response = await api.post(URL, json={**HI, "stream": True}, headers={"x-request-id": "r-9"})
    *_, last = events(response.text)
    assert last == {
        "type": "error",
        "error": {"type": "api_error", "message": "It broke.", "details": {"error_code": "engine_failed"}},
        "request_id": "r-9",
    }


async def test_an_error_before_the_first_token_has_its_status(api: httpx.AsyncClient, replica: FakeReplica) -> None:
    replica.scripts = [says(Failure(FailureCode.OVERLOADED, "Full.", retry_after_s=3))]
    response = await api.post(URL, json={**HI, "stream": True})
    assert (response.status_code, response.headers["retry-after"]) == (503, "3")
    assert response.json()["error"]["type"] == "overloaded_error"


async def test_heartbeats_are_comments(
    replica: FakeReplica, writes: Callable[..., Script], make_app: Any, http: Any
) -> None:
    replica.scripts = [lambda request: [ALIVE, 0.1, *writes("Hello")(request)]]
    app = make_app(replica, stream={"heartbeat_s": 0.01})
    response = await http(app).post(URL, json={**HI, "stream": True})
    assert ": ping\n" in response.text
    assert replayed(events(response.text))["content"] == [{"type": "text", "text": "Hello"}]


async def test_tokens_are_counted(api: httpx.AsyncClient, replica: FakeReplica) -> None:
    body = {**HI, "system": "Be kind.", "metadata": {"user_id": "u"}, "stream": True, "temperature": 0.5}
    counted = await api.post(f"{URL}/count_tokens", json=body)
    assert not replica.requests
    message = (await api.post(URL, json={**body, "stream": False})).json()
    usage = message["usage"]
    assert counted.json() == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}
    del body["max_tokens"]
    assert (await api.post(f"{URL}/count_tokens", json=body)).json() == counted.json()


async def test_tokens_of_a_prompt_that_is_too_long_are_counted(api: httpx.AsyncClient) -> None:
    body = {**HI, "messages": [{"role": "user", "content": "fox " * 3000}]}
    assert (await api.post(f"{URL}/count_tokens", json=body)).json()["input_tokens"] > 3000
    refused = await api.post(URL, json=body)
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["details"] == {"error_code": "context_length_exceeded"}
    assert error["message"].startswith("prompt is too long: This model's maximum context length is 256 tokens.")
