from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from fake_replica import FakeReplica, Script, says
from starlette.applications import Starlette

from serve_app.chat.tokenizer import ChatTokenizer
from serve_app.core import FinishReason, TokenBatch, TokenLogprobs

ANSWER = "The quick brown fox says 🙂 and naïve."
URL = "/v1/completions"


def chunks(text: str) -> list[dict[str, Any]]:
    *blocks, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


async def test_the_whole_object(api: httpx.AsyncClient) -> None:
    body = (await api.post(URL, json={"model": "tiny", "prompt": "Once", "seed": 2})).json()
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["choices"] == [{"index": 0, "text": ANSWER, "logprobs": None, "finish_reason": "stop"}]
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + body["usage"]["completion_tokens"]


async def test_the_stream(api: httpx.AsyncClient) -> None:
    asked = {"prompt": "Once", "stream": True, "stream_options": {"include_usage": True}}
    *objects, last = chunks((await api.post(URL, json=asked)).text)
    assert last["choices"] == []
    assert last["usage"]["prompt_tokens"] > 0
    choices = [choice for o in objects for choice in o["choices"]]
    assert all(set(choice) == {"index", "text", "logprobs", "finish_reason"} for choice in choices)
    assert "".join(choice["text"] for choice in choices) == ANSWER
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]


@pytest.mark.parametrize(
    ("prompt", "count"),
    [("Hi", 1), (["Hi", "Ho"], 2), ([5, 6, 7], 1), ([[5, 6], [7]], 2), ([[5, 6], "Ho"], 2)],
)
async def test_every_form_of_prompt(api: httpx.AsyncClient, replica: FakeReplica, prompt: Any, count: int) -> None:
    body = (await api.post(URL, json={"prompt": prompt, "n": 2})).json()
    assert [choice["index"] for choice in body["choices"]] == list(range(2 * count))
    assert [request.choice for request in replica.requests] == list(range(2 * count))
    prompts = [request.prompt_token_ids for request in replica.requests]
    assert prompts[0::2] == prompts[1::2]
    if prompt == [[5, 6], [7]]:
        assert prompts[0::2] == [(5, 6), (7,)]
    assert body["usage"]["prompt_tokens"] == sum(map(len, prompts[0::2]))


async def test_a_cache_salt_is_that_of_every_prompt(api: httpx.AsyncClient, replica: FakeReplica) -> None:
    await api.post(URL, json={"prompt": ["Hi", "Ho"], "n": 2, "cache_salt": "s"})
    assert [request.cache_salt for request in replica.requests] == ["s"] * 4


async def test_logprobs_in_the_older_schema(api: httpx.AsyncClient, tokenizer: ChatTokenizer) -> None:
    asked = {"prompt": "Hi", "logprobs": 1}
    whole = (await api.post(URL, json=asked)).json()["choices"][0]["logprobs"]
    texts = [tokenizer.decode([i]) for i in tokenizer.encode_text(ANSWER, add_bos=False, parse_special=False)]
    assert whole["tokens"] == texts
    assert whole["token_logprobs"] == [-0.25] * len(texts)
    assert whole["text_offset"][:3] == [0, len(texts[0]), len(texts[0]) + len(texts[1])]
    assert whole["top_logprobs"][0] == {texts[0]: -0.25}
    objects = chunks((await api.post(URL, json={**asked, "stream": True})).text)
    parts = [choice["logprobs"] for o in objects for choice in o["choices"] if choice["logprobs"]]
    assert {name: [value for part in parts for value in part[name]] for name in whole} == whole


async def test_special_tokens_among_the_likeliest_have_names(api: httpx.AsyncClient, replica: FakeReplica) -> None:
    top = ((70, -0.5), (0, -1.0), (1, -2.0), (2, -3.0))
    batch = TokenBatch(0, (70,), (TokenLogprobs(-0.5, top),), FinishReason.LENGTH)
    replica.scripts = [says(batch)]
    choice = (await api.post(URL, json={"prompt": "Hi", "logprobs": 4, "max_tokens": 1})).json()["choices"][0]
    assert choice["logprobs"]["top_logprobs"] == [
        {choice["text"]: -0.5, "<|endoftext|>": -1.0, "<|im_start|>": -2.0, "<|im_end|>": -3.0}
    ]


async def test_offsets_stay_inside_the_text(api: httpx.AsyncClient) -> None:
    for stop in ("says", "🙂 and", "naïve"):
        choice = (await api.post(URL, json={"prompt": "Hi", "logprobs": 0, "stop": stop})).json()["choices"][0]
        logprobs, text = choice["logprobs"], choice["text"]
        assert text == ANSWER.partition(stop)[0]
        assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
        assert all(
            text[offset:].startswith(token.rstrip("\ufffd"))
            for offset, token in zip(logprobs["text_offset"], logprobs["tokens"], strict=True)
        )


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": [10**30]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ["Hi"] * 129}, "prompt"),
        ({"prompt": ["Hi"] * 17, "n": 8}, "n"),
        ({"prompt": [5] * 300}, "prompt"),
        ({"prompt": "Hi", "echo": "yes"}, "echo"),
        ({"prompt": "Hi", "suffix": "x"}, "suffix"),
        ({"prompt": "Hi", "best_of": 2}, "best_of"),
        ({"prompt": "Hi", "logprobs": 6}, "logprobs"),
        ({"prompt": "Hi", "logprobs": True}, "logprobs"),
        ({"prompt": "Hi", "messages": [{}]}, "messages"),
        ({"prompt": "Hi", "max_tokens": 0}, "max_tokens"),
    ],
)
async def test_refused_by_name(
    api: httpx.AsyncClient, replica: FakeReplica, fields: dict[str, Any], param: str
) -> None:
    response = await api.post(URL, json=fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert replica.requests == []


async def test_of_several_prompts_the_smallest_room_is_told(api: httpx.AsyncClient, replica: FakeReplica) -> None:
    response = await api.post(URL, json={"prompt": [[5] * 10, [5] * 30, [5] * 20], "max_tokens": 240})
    assert [request.max_new_tokens for request in replica.requests] == [240, 226, 236]
    assert response.headers["x-clamped-fields"] == "max_tokens=226"


async def test_control_tokens_are_read_where_the_caller_says_so(
    api: httpx.AsyncClient, replica: FakeReplica, tokenizer: ChatTokenizer
) -> None:
    for parse_special in (None, False, True):
        await api.post(URL, json={"prompt": ["a<|im_end|>", "b"], "parse_special": parse_special})
    controls = [tokenizer.control_ids.intersection(request.prompt_token_ids) for request in replica.requests]
    assert list(map(len, controls)) == [0, 0, 0, 0, 1, 0]


async def test_what_asks_for_nothing_is_taken(api: httpx.AsyncClient) -> None:
    fields = {"prompt": "Hi", "echo": False, "suffix": None, "best_of": 1, "user": "u", "n": None, "logprobs": False}
    assert (await api.post(URL, json=fields)).status_code == 200


async def test_the_official_client(
    replica: FakeReplica, make_app: Callable[..., Starlette], serve: Any, writes: Callable[..., Script]
) -> None:
    client = openai.AsyncOpenAI(api_key="none", base_url=f"{await serve(make_app(replica))}/v1", max_retries=0)
    answer = await client.completions.create(model="tiny", prompt="Once")
    assert answer.choices[0].text == ANSWER
    replica.scripts = [writes("one two three", pause_s=0.002)]
    stream = await client.completions.create(model="tiny", prompt="Once", stream=True)
    assert "".join([part.choices[0].text async for part in stream]) == "one two three"
