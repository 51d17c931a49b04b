from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from fake_replica import ALIVE, FakeReplica, Script, card, says, tokens
from memory_metrics import MemoryMetrics
from starlette.applications import Starlette

from serve_app.chat.tokenizer import ChatTokenizer
from serve_app.core import Failure, FailureCode
from serve_app.generation.replica import ReplicaLost

ANSWER = "The quick brown fox says 🙂 and naïve."
HI: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
URL = "/v1/chat/completions"
Serve = Callable[[Starlette], Any]


def chunks(text: str) -> list[dict[str, Any]]:
    """The objects of a stream, which must end with [DONE]."""
    *blocks, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


async def test_the_whole_object(api: httpx.AsyncClient, replica: FakeReplica) -> None:
    response = await api.post(URL, json={**HI, "seed": 3})
    assert response.status_code == 200
    assert response.headers["x-seed"] == "3"
    body = response.json()
    assert body.pop("id").startswith("chatcmpl-")
    assert isinstance(body.pop("created"), int)
    assert body.pop("system_fingerprint").startswith("fp_")
    prompt_tokens = len(replica.requests[0].prompt_token_ids)
    completion_tokens = body["usage"]["completion_tokens"]
    assert body == {
        "object": "chat.completion",
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": ANSWER, "refusal": None, "annotations": []},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": 2},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
    }


@pytest.mark.parametrize("include_usage", [True, False])
async def test_the_stream(api: httpx.AsyncClient, include_usage: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if include_usage else {}
    response = await api.post(URL, json={**HI, "stream": True, **options})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    objects = chunks(response.text)
    assert len({(o["id"], o["created"], o["system_fingerprint"]) for o in objects}) == 1
    assert {(o["object"], o["model"]) for o in objects} == {("chat.completion.chunk", "tiny")}
    if include_usage:
        *objects, last = objects
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] > 5
        assert all(o["usage"] is None for o in objects)
    else:
        assert all("usage" not in o for o in objects)
    choices = [choice for o in objects for choice in o["choices"]]
    assert all(set(choice) == {"index", "delta", "logprobs", "finish_reason"} for choice in choices)
    first, *middle, final = choices
    assert first["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert "".join(choice["delta"]["content"] for choice in middle) == ANSWER
    assert all(choice["delta"]["content"] and choice["finish_reason"] is None for choice in middle)
    assert (final["delta"], final["finish_reason"]) == ({}, "stop")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("headers", [{}, {"X-Stream-Resume": "1"}], ids=["plain", "resumable"])
async def test_cache_hits_are_told_though_a_stop_string_ends_the_answer(
    api: httpx.AsyncClient,
    replica: FakeReplica,
    writes: Callable[..., Script],
    metrics: MemoryMetrics,
    stream: bool,
    headers: dict[str, str],
) -> None:
    lost = lambda request: [*writes(end=None, cached=2)(request)[:2], ReplicaLost("died")]  # noqa: E731
    replica.scripts = [lost, writes(end=None, cached=64)]  # what the second one finds saves its caller nothing
    asked = {**HI, "stop": "fox", "stream": stream, "stream_options": {"include_usage": True} if stream else None}
    text = (await api.post(URL, json=asked, headers=headers)).text
    line = next(line for line in reversed(text.splitlines()) if '"usage": {' in line)
    usage = json.loads(line.removeprefix("data: "))["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2}
    assert metrics.counters["serve_app_prefix_cache_hits", ()] == 2
    assert len(replica.requests) == 2


async def test_n_choices_are_interleaved_and_share_the_seed(
    api: httpx.AsyncClient, replica: FakeReplica, writes: Callable[..., Script]
) -> None:
    replica.scripts = [writes("one two three"), writes("four five six"), writes("seven")]
    streamed = chunks((await api.post(URL, json={**HI, "n": 3, "stream": True})).text)
    texts = ["", "", ""]
    order = []
    for choice in (choice for o in streamed for choice in o["choices"]):
        texts[choice["index"]] += choice["delta"].get("content", "")
        order.append(choice["index"])
    assert sorted(texts) == sorted(["one two three", "four five six", "seven"])
    assert order != sorted(order)
    assert [request.choice for request in replica.requests] == [0, 1, 2]
    assert len({request.sampling.seed for request in replica.requests}) == 1
    replica.requests.clear()
    whole = (await api.post(URL, json={**HI, "n": 3})).json()
    assert [choice["message"]["content"] for choice in whole["choices"]] == texts
    assert whole["usage"]["prompt_tokens"] == len(replica.requests[0].prompt_token_ids)
    assert whole["usage"]["prompt_tokens_details"]["cached_tokens"] == 2


async def test_a_choice_that_fails_ends_the_others(api: httpx.AsyncClient, replica: FakeReplica) -> None:
    replica.scripts = [says(tokens(0, 50), None), says(ALIVE, 0.02, Failure(FailureCode.ENGINE_FAILED, "It broke."))]
    response = await api.post(URL, json={**HI, "n": 2, "stream": True})
    last = json.loads(response.text.split("\n\n")[-2].removeprefix("data: "))
    assert last["error"]["message"] == "It broke."
    assert "[DONE]" not in response.text
    assert replica.cancelled >= 1
    assert replica.closed == 2


async def test_logprobs(api: httpx.AsyncClient, tokenizer: ChatTokenizer) -> None:
    asked = {**HI, "logprobs": True, "top_logprobs": 2}
    whole = (await api.post(URL, json=asked)).json()["choices"][0]
    content = whole["logprobs"]["content"]
    ids = tokenizer.encode_text(ANSWER, add_bos=False, parse_special=False)
    assert len(content) == len(ids)
    assert whole["logprobs"]["refusal"] is None
    assert content[0] == {
        "token": "The",
        "bytes": [84, 104, 101],
        "logprob": -0.25,
        "top_logprobs": [
            {"token": "The", "bytes": [84, 104, 101], "logprob": -0.25},
            content[0]["top_logprobs"][1],
        ],
    }
    assert any(entry["token"].startswith(" ") for entry in content)
    objects = chunks((await api.post(URL, json={**asked, "stream": True})).text)
    streamed = [
        entry
        for o in objects
        for choice in o["choices"]
        if choice["logprobs"]
        for entry in choice["logprobs"]["content"]
    ]
    assert streamed == content


async def test_the_parts_of_a_character_have_bytes(
    api: httpx.AsyncClient, replica: FakeReplica, writes: Callable[..., Script]
) -> None:
    replica.scripts = [writes("a \U0001fae0 b")]
    choice = (await api.post(URL, json={**HI, "logprobs": True})).json()["choices"][0]
    entries = choice["logprobs"]["content"]
    assert any(entry["token"] == "\ufffd" for entry in entries)
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == choice["message"]["content"]


@pytest.mark.parametrize("batch", [1, 3, 100])
@pytest.mark.parametrize(
    ("stop", "told"), [(" fox", "The quick brown"), ("x says", "The quick brown"), ("fox naïve", ANSWER)]
)
async def test_a_stop_string_does_not_show_in_logprobs(
    api: httpx.AsyncClient, replica: FakeReplica, writes: Callable[..., Script], batch: int, stop: str, told: str
) -> None:
    replica.scripts = [writes(batch=batch)]
    asked = {**HI, "logprobs": True, "top_logprobs": 1, "stop": stop}
    whole = (await api.post(URL, json=asked)).json()
    (choice,) = whole["choices"]
    content = choice["logprobs"]["content"]
    text = choice["message"]["content"]
    assert text == ANSWER.partition(stop)[0]
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == told
    assert text.startswith(told)
    assert whole["usage"]["completion_tokens"] > len(content)  # those that made the stop string, or EOS, are counted
    for headers in ({}, {"X-Stream-Resume": "1"}):
        response = await api.post(URL, json={**asked, "stream": True}, headers=headers)
        lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: {")]
        choices = [entry for line in lines for entry in json.loads(line)["choices"]]
        entries = [entry for one in choices if one["logprobs"] for entry in one["logprobs"]["content"]]
        assert entries == content
        assert "".join(one["delta"].get("content") or "" for one in choices) == text


async def test_logprobs_without_top_ones(api: httpx.AsyncClient, replica: FakeReplica) -> None:
    choice = (await api.post(URL, json={**HI, "logprobs": True})).json()["choices"][0]
    assert choice["logprobs"]["content"][0]["top_logprobs"] == []
    assert replica.requests[0].sampling.logprobs == 0


async def test_every_sampling_field_reaches_the_replica(api: httpx.AsyncClient, replica: FakeReplica, eos: int) -> None:
    fields = {
        "temperature": 0.3, "top_p": 0.8, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2, "presence_penalty": 0.4,
        "frequency_penalty": -0.5, "seed": 11, "min_tokens": 2, "logit_bias": {"5": 1.5, "6": -100},
    }  # fmt: skip
    more = {"max_completion_tokens": 9, "stop_token_ids": [3], "ignore_eos": True, "cache_salt": "s"}
    await api.post(URL, json={**HI, **fields, **more})
    request = replica.requests[0]
    sampling = request.sampling
    assert {name: getattr(sampling, name) for name in fields if name != "logit_bias"} == {
        name: value for name, value in fields.items() if name != "logit_bias"
    }
    assert sampling.logit_bias == ((5, 1.5), (6, -100.0))
    assert request.max_new_tokens == 9
    assert request.cache_salt == "s"
    assert request.stop_token_ids == (3,)
    assert eos not in request.stop_token_ids


async def test_what_is_left_out_comes_from_the_model_then_from_openai(
    replica: FakeReplica, make_app: Callable[..., Starlette], http: Callable[[Starlette], httpx.AsyncClient], eos: int
) -> None:
    api = http(make_app(replica, defaults={"temperature": 0.6, "top_k": 20}))
    await api.post(URL, json={**HI, "top_k": None})
    sampling = replica.requests[0].sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.6, 20, 1.0)
    assert replica.requests[0].stop_token_ids == (eos,)
    assert replica.requests[0].max_new_tokens == 256 - len(replica.requests[0].prompt_token_ids)
    await api.post(URL, json={**HI, "temperature": 0, "top_k": 0})
    assert (replica.requests[1].sampling.temperature, replica.requests[1].sampling.top_k) == (0.0, 0)


async def test_an_end_that_the_model_can_not_make_ends_nothing(
    replica: FakeReplica, make_app: Callable[..., Starlette], http: Callable[[Starlette], httpx.AsyncClient], eos: int
) -> None:
    """A tokenizer's own EOS may lie beyond the model's vocabulary; the engine would refuse every request."""
    api = http(make_app(replica, defaults={"eos_token_ids": (eos, 10**6)}))
    await api.post(URL, json={**HI, "stop_token_ids": [5]})
    assert replica.requests[0].stop_token_ids == (eos, 5)


async def test_a_temperature_too_small_for_float32_is_greedy(api: httpx.AsyncClient, replica: FakeReplica) -> None:
    await api.post(URL, json={**HI, "temperature": 1e-300})
    assert replica.requests[0].sampling.temperature == 0.0


HARMLESS: dict[str, Any] = {
    "user": "u1", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "safety_identifier": "s",
    "prompt_cache_key": "k", "prompt_cache_retention": "24h", "parallel_tool_calls": True, "tools": [],
    "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"], "functions": None,
    "prediction": {"type": "content", "content": "x"}, "stream_options": None, "n": 1, "logprobs": False,
    "top_logprobs": None, "stop": None, "audio": None,
}  # fmt: skip


async def test_fields_that_change_nothing_are_taken(api: httpx.AsyncClient) -> None:
    response = await api.post(URL, json={**HI, **HARMLESS})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("functions", [{"name": "f"}], "unsupported_parameter"),
        ("structural_tag", {"triggers": ["a"]}, "unsupported_parameter"),
        ("modalities", ["text", "audio"], "unsupported_parameter"),
        ("audio", {"voice": "alloy"}, "unsupported_parameter"),
        ("temperature", "0.5", "invalid_type"),
        ("temperature", True, "invalid_type"),
        ("temperature", 2.1, "invalid_value"),
        ("temperature", -0.1, "invalid_value"),
        ("top_p", -0.1, "invalid_value"),
        ("top_k", 2**40, "invalid_value"),
        ("top_k", -2, "invalid_value"),
        ("max_tokens", 0, "invalid_value"),
        ("max_tokens", -2, "invalid_value"),
        ("max_completion_tokens", 0, "invalid_value"),
        ("max_tokens", 1.5, "invalid_type"),
        ("min_tokens", 10**6, "invalid_value"),
        ("n", 9, "invalid_value"),
        ("n", 0, "invalid_value"),
        ("seed", 2**64, "invalid_value"),
        ("seed", -(2**63) - 1, "invalid_value"),
        ("seed", "7", "invalid_type"),
        ("stop", 5, "invalid_type"),
        ("stop", ["a"] * 17, "invalid_value"),
        ("stop", ["x" * 1001], "invalid_value"),
        ("stop_token_ids", [10**6], "invalid_value"),
        ("stop_token_ids", [-1], "invalid_value"),
        ("logit_bias", {"a": 1}, "invalid_value"),
        ("logit_bias", {"1": 101}, "invalid_value"),
        ("logit_bias", {"99999": 1}, "invalid_value"),
        ("logit_bias", [1], "invalid_type"),
        ("cache_salt", "", "invalid_value"),
        ("cache_salt", "x" * 257, "invalid_value"),
        ("cache_salt", 5, "invalid_type"),
        ("top_logprobs", 3, "invalid_value"),
        ("messages", None, "invalid_type"),
        ("messages", "Hi", "invalid_type"),
        ("model", 5, "invalid_type"),
    ],
)
async def test_bad_fields_are_refused_by_name(
    api: httpx.AsyncClient, replica: FakeReplica, field: str, value: Any, code: str | None
) -> None:
    response = await api.post(URL, json={**HI, field: value})
    assert response.status_code == 400
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"].split("[")[0].split(".")[0] == field
    assert error["code"] == code
    assert replica.requests == []


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ([{}], "messages[0].role"),
        ([{"role": "wizard", "content": "Hi"}], "messages[0].role"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": "Hi", "tool_calls": [1]}], "messages[0].tool_calls"),
        ([{"role": "user", "content": "Hi", "images": ["aGk="]}], "messages[0].images"),
        ([{"role": "assistant", "content": "Hi", "audio": {"id": "a"}}], "messages[0].audio"),
        ([{"role": "assistant", "content": "Hi", "prefix": True}], "messages[0].prefix"),
        (["Hi"], "messages[0]"),
    ],
)
async def test_bad_messages_are_refused_by_place(api: httpx.AsyncClient, messages: Any, param: str) -> None:
    response = await api.post(URL, json={"messages": messages})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_a_prompt_longer_than_the_context(api: httpx.AsyncClient) -> None:
    response = await api.post(URL, json={"messages": [{"role": "user", "content": "fox jumps " * 300}]})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert error["message"].startswith("This model's maximum context length is 256 tokens. However, your messages ")


async def test_a_prompt_longer_than_the_cache(api: httpx.AsyncClient, replica: FakeReplica) -> None:
    replica.state = card(kv_capacity_tokens=4, vocab_size=1000)
    error = (await api.post(URL, json=HI)).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert error["message"].startswith("This model's maximum context length is 4 tokens. However, your messages ")


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize(
    ("stream", "headers"), [(False, {}), (True, {}), (True, {"X-Stream-Resume": "1"})], ids=["whole", "plain", "resume"]
)
async def test_more_tokens_than_there_is_room_for_are_clamped(
    api: httpx.AsyncClient, replica: FakeReplica, name: str, stream: bool, headers: dict[str, str]
) -> None:
    replica.state = card(kv_capacity_tokens=64, vocab_size=1000)
    response = await api.post(URL, json={**HI, name: 10**9, "stream": stream}, headers=headers)
    assert response.status_code == 200
    room = 64 - len(replica.requests[0].prompt_token_ids)
    assert replica.requests[0].max_new_tokens == room
    assert response.headers["x-clamped-fields"] == f"{name}={room}"
    response = await api.post(URL, json={**HI, name: room, "stream": stream}, headers=headers)
    assert replica.requests[1].max_new_tokens == room
    assert "x-clamped-fields" not in response.headers


async def test_another_model_is_not_found(
    replica: FakeReplica, make_app: Callable[..., Starlette], http: Callable[[Starlette], httpx.AsyncClient]
) -> None:
    api = http(make_app(replica, aliases=frozenset({"owner/tiny"})))
    response = await api.post(URL, json={**HI, "model": "gpt-4o"})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert (await api.post(URL, json={"messages": HI["messages"]})).status_code == 200
    for name in ("", "tiny", "owner/tiny", None):
        response = await api.post(URL, json={**HI, "model": name})
        assert (response.status_code, response.json()["model"]) == (200, "tiny")
    assert (await api.get("/v1/models/owner/tiny")).json()["id"] == "tiny"
    assert (await api.get("/v1/models/owner/other")).status_code == 404


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"top_p": 0, "temperature": 1}, {"temperature": 0.0, "top_p": 1.0}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"repeat_penalty": 1.3, "repeat_last_n": -1}, {"repetition_penalty": 1.3}),
        ({"repetition_penalty": None, "repeat_penalty": 1.3}, {"repetition_penalty": 1.3}),
        ({"repetition_penalty": 1.3, "repeat_penalty": None}, {"repetition_penalty": 1.3}),
        ({"repetition_penalty": 1.3, "repeat_penalty": 1.3}, {"repetition_penalty": 1.3}),
        ({"top_logprobs": 0}, {"logprobs": None}),
        ({"top_logprobs": 0, "logprobs": True}, {"logprobs": 0}),
        ({"seed": -2}, {"seed": 2**64 - 2}),
        ({"seed": -(2**63)}, {"seed": 2**63}),
    ],
)
async def test_values_mean_what_they_mean_elsewhere(
    api: httpx.AsyncClient, replica: FakeReplica, fields: dict[str, Any], told: dict[str, Any]
) -> None:
    response = await api.post(URL, json={**HI, **fields})
    assert response.status_code == 200, response.text
    assert {name: getattr(replica.requests[0].sampling, name) for name in told} == told
    assert "x-ignored-fields" not in response.headers


async def test_two_names_of_the_penalty_with_two_values_are_refused(
    api: httpx.AsyncClient, replica: FakeReplica
) -> None:
    response = await api.post(URL, json={**HI, "repetition_penalty": 1.1, "repeat_penalty": 1.3})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "repeat_penalty")
    response = await api.post(URL, json={**HI, "repeat_penalty": 0})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "repeat_penalty")
    assert replica.requests == []


@pytest.mark.parametrize("url", [URL, "/v1/completions", "/stream"])
async def test_a_seed_of_minus_one_is_none(api: httpx.AsyncClient, replica: FakeReplica, url: str) -> None:
    body = HI if url == URL else {"prompt": "Hi"}
    for _ in range(2):
        await api.post(url, json={**body, "seed": -1})
    first, second = (request.sampling.seed for request in replica.requests)
    assert first != second
    assert max(first, second) < 2**53


@pytest.mark.parametrize("url", [URL, "/v1/completions", "/stream"])
@pytest.mark.parametrize("stop", ["", [""], []])
async def test_no_limit_and_no_stop(api: httpx.AsyncClient, replica: FakeReplica, url: str, stop: Any) -> None:
    replica.state = card(context_tokens=1000, kv_capacity_tokens=1000, vocab_size=1000)
    body = {"messages": HI["messages"]} if url == URL else {"prompt": "Hi"}
    response = await api.post(url, json={**body, "max_tokens": -1, "stop": stop})
    assert response.status_code == 200, response.text
    (request,) = replica.requests
    assert request.max_new_tokens == 1000 - len(request.prompt_token_ids)
    response = await api.post(url, json={**body, "stop": ["", "fox"]})
    assert "jumps" not in response.text
    assert "says" not in response.text


@pytest.mark.parametrize("batch", [1, 3, 100])
@pytest.mark.parametrize(
    ("stop", "answer"), [("fox", "a fox, a fox"), ("a", "a a a a a a"), (["ox, a fo", "x"], "a fox, a fox")]
)
async def test_stop_strings_wait_for_min_tokens(
    api: httpx.AsyncClient,
    replica: FakeReplica,
    tokenizer: ChatTokenizer,
    writes: Callable[..., Script],
    batch: int,
    stop: Any,
    answer: str,
) -> None:
    ids = tokenizer.encode_text(answer, add_bos=False, parse_special=False)
    ends = [len(tokenizer.decode(ids[: index + 1])) for index in range(len(ids))]
    stops = [stop] if isinstance(stop, str) else stop
    for least in range(len(ids) + 1):
        replica.scripts = [writes(answer, batch=batch)]
        asked = {**HI, "stop": stop, "min_tokens": least}
        whole = (await api.post(URL, json=asked)).json()["choices"][0]["message"]["content"]
        # The first place where a stop string is complete in the text of a later token than the first `least`.
        before = ends[least - 1] if least else 0
        done = [
            (end, end - len(one))
            for end in range(before + 1, len(answer) + 1)
            for one in stops
            if answer.endswith(one, 0, end)
        ]
        assert whole == (answer[: min(done)[1]] if done else answer)
        for headers in ({}, {"X-Stream-Resume": "1"}):
            response = await api.post(URL, json={**asked, "stream": True}, headers=headers)
            lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: {")]
            choices = [entry for line in lines for entry in json.loads(line)["choices"]]
            assert "".join(one["delta"].get("content") or "" for one in choices) == whole


async def test_both_names_of_max_tokens(api: httpx.AsyncClient) -> None:
    assert (await api.post(URL, json={**HI, "max_tokens": 5, "max_completion_tokens": 5})).status_code == 200
    assert (await api.post(URL, json={**HI, "max_tokens": 5, "max_completion_tokens": 6})).status_code == 400


@pytest.fixture
async def official(replica: FakeReplica, make_app: Callable[..., Starlette], serve: Serve) -> openai.AsyncOpenAI:
    url = await serve(make_app(replica, stream={"heartbeat_s": 0.02}))
    return openai.AsyncOpenAI(api_key="none", base_url=f"{url}/v1", max_retries=0)


async def test_the_official_client(official: openai.AsyncOpenAI) -> None:
    answer = await official.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Hi"}], seed=1)
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert [model.id async for model in official.models.list()] == ["tiny"]


async def test_the_official_client_streams_through_heartbeats(
    official: openai.AsyncOpenAI, replica: FakeReplica, writes: Callable[..., Script]
) -> None:
    replica.scripts = [writes("one two three", pause_s=0.05)]
    stream = await official.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Hi"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    parts = [chunk async for chunk in stream]
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == "one two three"
    assert parts[-1].usage is not None
    assert parts[0].choices[0].delta.role == "assistant"


async def test_the_official_client_raises_our_errors(official: openai.AsyncOpenAI, replica: FakeReplica) -> None:
    messages: Any = [{"role": "user", "content": "Hi"}]
    with pytest.raises(openai.BadRequestError, match="temperature"):
        await official.chat.completions.create(model="tiny", messages=messages, temperature=9)
    with pytest.raises(openai.NotFoundError):
        await official.chat.completions.create(model="other", messages=messages)
    replica.scripts = [says(Failure(FailureCode.OVERLOADED, "Full.", 1))]
    with pytest.raises(openai.InternalServerError, match="Full"):
        await official.chat.completions.create(model="tiny", messages=messages)
    replica.scripts = [says(tokens(0, 50), 0.02, Failure(FailureCode.ENGINE_FAILED, "It broke."))]
    stream = await official.chat.completions.create(model="tiny", messages=messages, stream=True)
    with pytest.raises(openai.APIError, match="It broke"):
        [chunk async for chunk in stream]
