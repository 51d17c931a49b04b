"""Prompts before their answers, prompt logprobs, token ids: what evaluation harnesses and vLLM's clients ask."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from fake_replica import FakeReplica, Script, card
from small_tokenizers import byte_level_backend, metaspace_backend
from starlette.applications import Starlette

from serve_app.chat.tokenizer import ChatTokenizer
from serve_app.core import FinishReason, GenerationRequest, TokenBatch, TokenLogprobs
from serve_app.generation.replica import ReplicaLost
from serve_app.resume.journal_store import JournalLimits
from serve_app.resume.memory_store import MemoryJournalStore

ANSWER = "The quick brown fox says 🙂 and naïve."
PROMPT = "Größe, naïve café 🙂"
TEXT = "/v1/completions"
CHAT = "/v1/chat/completions"
HI = {"messages": [{"role": "user", "content": "Hi"}]}
Writes = Callable[..., Script]


def objects(text: str) -> list[dict[str, Any]]:
    """The chunks of a stream, with or without ids."""
    *blocks, done, rest = re.sub(r"(?m)^(id|retry): .*\n", "", text).split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def joined(chunks: list[dict[str, Any]], index: int = 0) -> dict[str, Any]:
    """The choice `index` of a stream, as it would be in a whole answer."""
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    lists = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    names = lists[0] if lists else ()
    ids = [choice["token_ids"] for choice in choices if "token_ids" in choice]
    prompts = [choice["prompt_token_ids"] for choice in choices if "prompt_token_ids" in choice]
    return {
        "index": index,
        "text": "".join(choice["text"] for choice in choices),
        "logprobs": {name: [value for each in lists for value in each[name]] for name in names} if lists else None,
        "finish_reason": choices[-1]["finish_reason"],
        **({"token_ids": [token_id for each in ids for token_id in each]} if ids else {}),
        **({"prompt_token_ids": prompts[0]} if prompts else {}),
    }


@pytest.fixture
def prompt_ids(tokenizer: ChatTokenizer) -> list[int]:
    return tokenizer.encode_text(PROMPT, add_bos=False, parse_special=False)


@pytest.mark.parametrize("logprobs", [None, 0, 2])
@pytest.mark.parametrize("max_tokens", [0, 1, 300])
@pytest.mark.parametrize("n", [1, 2])
async def test_an_echo_is_the_prompt_before_the_answer_streamed_or_not(
    api: httpx.AsyncClient,
    replica: FakeReplica,
    prompt_ids: list[int],
    logprobs: int | None,
    max_tokens: int,
    n: int,
) -> None:
    asked = {"prompt": [PROMPT, prompt_ids], "echo": True, "logprobs": logprobs, "max_tokens": max_tokens, "n": n}
    asked |= {"seed": 1, "return_token_ids": True}
    body = (await api.post(TEXT, json=asked)).json()
    answer = {0: "", 1: "The", 300: ANSWER}[max_tokens]
    assert [choice["text"] for choice in body["choices"]] == [PROMPT + answer] * 2 * n
    assert {choice["finish_reason"] for choice in body["choices"]} == {"stop" if max_tokens == 300 else "length"}
    for choice in body["choices"]:
        assert choice["prompt_token_ids"] == prompt_ids
        if logprobs is None:
            assert choice["logprobs"] is None
            continue
        told = choice["logprobs"]
        assert {len(values) for values in told.values()} == {len(prompt_ids) + len(choice["token_ids"])}
        assert (told["token_logprobs"][0], told["top_logprobs"][0]) == (None, None)
        assert told["token_logprobs"][1 : len(prompt_ids)] == [-token_id / 8 for token_id in prompt_ids[1:]]
        assert [len(top) for top in told["top_logprobs"][1 : len(prompt_ids)]] == [1 + logprobs] * (len(prompt_ids) - 1)
        assert all(
            choice["text"][offset:].startswith(token.rstrip("\ufffd")) or token == "<|im_end|>"
            for offset, token in zip(told["text_offset"], told["tokens"], strict=True)
        )
        assert told["text_offset"] == sorted(told["text_offset"])
    assert body["usage"]["total_tokens"] == 2 * len(prompt_ids) + sum(len(c["token_ids"]) for c in body["choices"])
    for headers in ({}, {"X-Stream-Resume": "1"}):
        response = await api.post(TEXT, json={**asked, "stream": True}, headers=headers)
        chunks = objects(response.text)
        assert [joined(chunks, index) for index in range(2 * n)] == body["choices"]
    assert all((request.prompt_logprobs is None) == (logprobs is None) for request in replica.requests)


async def test_what_lm_eval_reads(api: httpx.AsyncClient, writes: Writes, replica: FakeReplica, eos: int) -> None:
    """`local-completions` cuts the last entry off, which belongs to the one token it has to ask for: even if that is
    EOS. From there it sums up the continuation's logprobs, and compares each with the largest of its place."""
    prompts = [[5, 6, 70, 71], [9, 10, 80], [300, 301, 302, 303, 304]]

    def script(request: GenerationRequest) -> list[TokenBatch]:
        (batch,) = [*writes("")(request)]
        assert batch.token_ids == (eos,)  # type: ignore[union-attr]
        return [batch]  # type: ignore[list-item]

    replica.scripts = [script]
    asked = {"model": "tiny", "prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234}
    response = await api.post(TEXT, json={**asked, "echo": True})
    assert response.status_code == 200
    assert "x-ignored-fields" not in response.headers
    for choice, prompt in zip(response.json()["choices"], prompts, strict=True):
        told, context = choice["logprobs"], 2
        assert sum(told["token_logprobs"][context:-1]) == sum(-token_id / 8 for token_id in prompt[context:])
        assert [max(top.values()) for top in told["top_logprobs"][context:-1]] == [0.0] * (len(prompt) - context)


async def test_tokens_with_the_same_text_are_all_listed(
    api: httpx.AsyncClient, replica: FakeReplica, tokenizer: ChatTokenizer
) -> None:
    """Else a token would seem to be the likeliest in its place because its text is that of a likelier one."""
    first, second, *_ = (token_id for token_id in range(200) if tokenizer.decode([token_id]) == "\ufffd")
    batch = TokenBatch(0, (first,), (TokenLogprobs(-2.0, ((second, -0.5), (70, -1.0))),), FinishReason.LENGTH)
    replica.scripts = [lambda request: [batch]]
    body = (await api.post(TEXT, json={"prompt": "Hi", "logprobs": 2})).json()
    (top,) = body["choices"][0]["logprobs"]["top_logprobs"]
    assert (top["\ufffd"], top[f"token_id:{second}"], max(top.values())) == (-2.0, -0.5, -0.5)


async def test_prompt_logprobs_as_vllm_writes_them(
    api: httpx.AsyncClient, replica: FakeReplica, tokenizer: ChatTokenizer, prompt_ids: list[int]
) -> None:
    body = (await api.post(TEXT, json={"prompt": PROMPT, "prompt_logprobs": 2, "n": 2})).json()
    told = body["choices"][0]["prompt_logprobs"]
    assert body["choices"][1]["prompt_logprobs"] == told
    assert [request.prompt_logprobs for request in replica.requests] == [2, None], "computed once"
    assert told[0] is None
    for token_id, places in zip(prompt_ids[1:], told[1:], strict=True):
        own = {"logprob": -token_id / 8, "rank": 2, "decoded_token": tokenizer.decode([token_id])}
        likely = {"logprob": 0.0, "rank": 1, "decoded_token": "<|im_start|>"}
        assert (places[str(token_id)], places["1"]) == (own, likely)
    body = (await api.post(CHAT, json={**HI, "prompt_logprobs": 0, "max_tokens": 3})).json()
    (request,) = replica.requests[2:]
    assert [None if places is None else [*places] for places in body["prompt_logprobs"]] == [
        None,
        *([str(token_id)] for token_id in request.prompt_token_ids[1:]),
    ]
    body = (await api.post(TEXT, json={"prompt": "Hi", "prompt_logprobs": 1, "max_tokens": 0})).json()
    assert (body["choices"][0]["text"], body["choices"][0]["finish_reason"]) == ("", "length")


@pytest.mark.parametrize("url", [TEXT, CHAT])
async def test_token_ids_are_shown_whole_and_streamed(
    api: httpx.AsyncClient, replica: FakeReplica, tokenizer: ChatTokenizer, eos: int, url: str
) -> None:
    asked = {"prompt": "Hi"} if url == TEXT else HI
    asked = {**asked, "return_token_ids": True, "stop": "says", "seed": 1}
    body = (await api.post(url, json=asked)).json()
    prompt, ids = list(replica.requests[0].prompt_token_ids), body["choices"][0]["token_ids"]
    assert tokenizer.decode(ids).startswith("The quick brown fox says")
    assert len(ids) == body["usage"]["completion_tokens"]
    assert (body if url == CHAT else body["choices"][0])["prompt_token_ids"] == prompt
    for headers in ({}, {"X-Stream-Resume": "1"}):
        response = await api.post(url, json={**asked, "stream": True}, headers=headers)
        chunks = objects(response.text)
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        assert [token_id for choice in choices for token_id in choice.get("token_ids", ())] == ids
        shown = [each["prompt_token_ids"] for each in [*chunks, *choices] if "prompt_token_ids" in each]
        assert shown == [prompt]
    whole = (await api.post(url, json={**asked, "stop": None})).json()["choices"][0]["token_ids"]
    assert whole[-1] == eos


async def test_tokens_may_be_shown_as_ids(api: httpx.AsyncClient, replica: FakeReplica) -> None:
    shown = {"return_tokens_as_token_ids": True, "return_token_ids": True}
    body = (await api.post(TEXT, json={"prompt": [[5, 6]], "logprobs": 1, "echo": True, **shown})).json()
    (choice,) = body["choices"]
    names = [f"token_id:{token_id}" for token_id in [5, 6, *choice["token_ids"]]]
    assert choice["logprobs"]["tokens"] == names
    assert [*choice["logprobs"]["top_logprobs"][1]] == ["token_id:1", "token_id:6"]
    body = (await api.post(CHAT, json={**HI, "logprobs": True, **shown})).json()
    (choice,) = body["choices"]
    told = [entry["token"] for entry in choice["logprobs"]["content"]]
    assert told == [f"token_id:{token_id}" for token_id in choice["token_ids"][:-1]]


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"truncate_prompt_tokens": 3}, slice(-3, None)),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, slice(None, 3)),
        ({"truncate_prompt_tokens": 5000}, None),
        ({"truncate_prompt_tokens": -1}, slice(-255, None)),
        ({"truncate_prompt_tokens": -1, "max_tokens": 56}, slice(-200, None)),
        ({"truncate_prompt_tokens": -1, "max_tokens": 255}, slice(-1, None)),
    ],
)
async def test_prompts_are_cut_as_asked(
    api: httpx.AsyncClient, replica: FakeReplica, fields: dict[str, Any], kept: slice | None
) -> None:
    prompt = [index % 500 for index in range(400)]
    response = await api.post(TEXT, json={"prompt": prompt, **fields})
    if kept is None:
        assert response.json()["error"]["code"] == "context_length_exceeded"
        return
    assert response.status_code == 200, response.text
    assert list(replica.requests[0].prompt_token_ids) == prompt[kept]


async def test_texts_and_chats_beyond_the_context_are_cut_too(api: httpx.AsyncClient, replica: FakeReplica) -> None:
    text = "fox " * 700
    for url, asked in (
        (TEXT, {"prompt": text}),
        (CHAT, {"messages": [{"role": "user", "content": text}]}),
    ):
        assert (await api.post(url, json=asked)).json()["error"]["code"] == "context_length_exceeded"
        assert (await api.post(url, json={**asked, "truncate_prompt_tokens": 100})).status_code == 200
    assert [len(request.prompt_token_ids) for request in replica.requests] == [100, 100]


async def test_a_prompt_of_the_whole_context_may_be_scored(api: httpx.AsyncClient, replica: FakeReplica) -> None:
    for prompt in ([5] * 256, "(" * 256):
        asked = {"prompt": prompt, "echo": True, "logprobs": 0, "max_tokens": 0}
        response = await api.post(TEXT, json=asked)
        assert response.status_code == 200, response.text
        assert len(response.json()["choices"][0]["logprobs"]["tokens"]) == 256
        assert (await api.post(TEXT, json={**asked, "max_tokens": 1})).status_code == 400


@pytest.mark.parametrize("url", [TEXT, CHAT])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"truncate_prompt_tokens": -1, "max_tokens": 256}, "truncate_prompt_tokens"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": "1"}, "prompt_logprobs"),
        ({"prompt_logprobs": 0, "stream": True}, "prompt_logprobs"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"truncation_side": "middle"}, "truncation_side"),
        ({"return_token_ids": "yes"}, "return_token_ids"),
        ({"service_tier": "gold"}, "service_tier"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"suffix": "x"}, "suffix"),
    ],
)
async def test_what_makes_no_sense_is_refused(
    api: httpx.AsyncClient, replica: FakeReplica, url: str, fields: dict[str, Any], param: str
) -> None:
    response = await api.post(url, json={**({"prompt": "Hi"} if url == TEXT else HI), **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert replica.requests == []


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [5], "suffix": "x"},
        {"prompt": "a", "suffix": "x", "echo": True},
        {"prompt": "a", "suffix": "x", "truncate_prompt_tokens": 5},
        {"prompt": "a", "suffix": "x", "add_special_tokens": False},
    ],
)
async def test_what_does_not_go_with_a_suffix(api: httpx.AsyncClient, fields: dict[str, Any]) -> None:
    response = await api.post(TEXT, json=fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "suffix")


async def test_off_is_off(api: httpx.AsyncClient, replica: FakeReplica) -> None:
    off = {"prompt_logprobs": False, "echo": False, "suffix": "", "return_token_ids": False, "priority": 0}
    off |= {"truncate_prompt_tokens": None, "service_tier": None, "add_special_tokens": True}
    response = await api.post(TEXT, json={"prompt": "Hi", **off})
    assert response.status_code == 200
    assert "x-ignored-fields" not in response.headers
    assert set(response.json()["choices"][0]) == {"index", "text", "logprobs", "finish_reason"}
    assert "service_tier" not in response.json()


@pytest.mark.parametrize("url", [TEXT, CHAT])
@pytest.mark.parametrize("tier", ["auto", "default", "flex", "scale", "priority"])
async def test_every_tier_but_flex_is_the_default_one(api: httpx.AsyncClient, url: str, tier: str) -> None:
    asked = {**({"prompt": "Hi"} if url == TEXT else HI), "service_tier": tier}
    used = "flex" if tier == "flex" else "default"
    assert (await api.post(url, json=asked)).json()["service_tier"] == used
    chunks = objects((await api.post(url, json={**asked, "stream": True})).text)
    assert {chunk["service_tier"] for chunk in chunks} == {used}


async def test_too_many_logprobs_of_prompts_are_refused(
    make_app: Callable[..., Starlette], http: Callable[..., httpx.AsyncClient], writes: Writes
) -> None:
    replica = FakeReplica([writes("a")], state=card(context_tokens=100_000, kv_capacity_tokens=200_000))
    api = http(make_app(replica))
    asked = {"prompt": [5] * 30_000, "max_tokens": 1, "logprobs": 0, "echo": True}
    assert (await api.post(TEXT, json=asked)).status_code == 200
    for more, most in (({"prompt_logprobs": 20}, "500000"), ({"stream": True}, "10000")):
        response = await api.post(TEXT, json={**asked, **more})
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, "logprobs")
        assert most in error["message"]


async def test_a_long_prompts_logprobs_are_written_in_a_thread(
    make_app: Callable[..., Starlette],
    http: Callable[..., httpx.AsyncClient],
    writes: Writes,
    tokenizer: ChatTokenizer,
) -> None:
    """And the chunks of a stream hold the same as the whole answer."""
    replica = FakeReplica([writes()], state=card(context_tokens=10_000, kv_capacity_tokens=20_000))
    api = http(make_app(replica))
    prompt = tokenizer.encode_text(PROMPT * 300, add_bos=False, parse_special=False)[:3000]
    asked = {"prompt": prompt, "logprobs": 2, "echo": True, "max_tokens": 5, "seed": 1}
    whole = (await api.post(TEXT, json=asked)).json()["choices"][0]
    assert len(whole["logprobs"]["tokens"]) == len(prompt) + 5
    for headers in ({}, {"X-Stream-Resume": "1"}):
        response = await api.post(TEXT, json={**asked, "stream": True}, headers=headers)
        assert joined(objects(response.text)) == whole


@pytest.mark.parametrize("max_tokens", [0, 4])
async def test_another_ingress_writes_the_same_echo_from_the_journal(
    make_app: Callable[..., Starlette], http: Callable[..., httpx.AsyncClient], writes: Writes, max_tokens: int
) -> None:
    store = MemoryJournalStore(JournalLimits(lease_s=60))
    apps = [http(make_app(FakeReplica([writes()], state=card()), journals=store)) for _ in range(2)]
    asked = {"prompt": PROMPT, "echo": True, "logprobs": 2, "max_tokens": max_tokens, "stream": True, "seed": 1}
    resume = {"X-Stream-Resume": "1"}
    first = await apps[0].post(TEXT, json={**asked, "return_token_ids": True}, headers=resume)
    again = await apps[1].get(f"/v1/streams/{first.headers['x-stream-id']}")
    assert again.text == first.text
    assert PROMPT in joined(objects(first.text))["text"]


@pytest.mark.parametrize("delivered", [0, 2])
async def test_a_replica_that_dies_costs_no_logprob(
    api: httpx.AsyncClient, replica: FakeReplica, writes: Writes, delivered: int
) -> None:
    asked = {"prompt": PROMPT, "echo": True, "logprobs": 2, "seed": 1}
    expected = (await api.post(TEXT, json=asked)).json()["choices"]

    def dies(request: GenerationRequest) -> list[Any]:
        return [*list(writes()(request))[:delivered], ReplicaLost("it died")]

    replica.scripts = [writes(), dies, writes()]
    assert (await api.post(TEXT, json=asked)).json()["choices"] == expected
    assert [request.needs_prompt_logprobs for request in replica.requests] == [True, True, delivered == 0]


async def test_the_official_client_echoes(replica: FakeReplica, make_app: Callable[..., Starlette], serve: Any) -> None:
    client = openai.AsyncOpenAI(api_key="none", base_url=f"{await serve(make_app(replica))}/v1", max_retries=0)
    answer = await client.completions.create(model="tiny", prompt=PROMPT, echo=True, logprobs=1, max_tokens=0)
    assert answer.choices[0].text == PROMPT
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.token_logprobs is not None
    chat = await client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Hi"}],
        service_tier="flex",
        extra_body={"prompt_logprobs": 0, "return_token_ids": True},
    )
    assert chat.service_tier == "flex"
    assert chat.model_extra is not None
    assert len(chat.model_extra["prompt_logprobs"]) == len(chat.model_extra["prompt_token_ids"])


async def test_prompts_may_begin_without_bos(
    make_app: Callable[..., Starlette], http: Callable[..., httpx.AsyncClient]
) -> None:
    special_tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    backend = metaspace_backend().to_str()
    text = ChatTokenizer(
        backend, control_tokens=["<s>", "</s>"], template=None, special_tokens=special_tokens, adds_bos=True
    )
    replica = FakeReplica([lambda request: [TokenBatch(0, (5,), None, FinishReason.LENGTH)]], state=card())
    api = http(make_app(replica, text=text))
    for add in (None, True, False):
        asked = {"prompt": "fox", "max_tokens": 1, "add_special_tokens": add, "echo": True}
        assert (await api.post(TEXT, json=asked)).json()["choices"][0]["text"].startswith("fox")
    with_bos, same, without = (request.prompt_token_ids for request in replica.requests)
    assert with_bos == same == (text.bos_token_id, *without)


async def test_an_answer_between_two_texts(
    make_app: Callable[..., Starlette], http: Callable[..., httpx.AsyncClient], writes: Writes
) -> None:
    backend = byte_level_backend()
    marks = ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"]
    backend.add_special_tokens(marks)
    text = ChatTokenizer(backend.to_str(), control_tokens=marks, template=None, special_tokens={}, adds_bos=False)
    replica = FakeReplica([writes()], state=card(vocab_size=text.vocab_size))
    asked = {"prompt": ["def f(", "class "], "suffix": "): <fim_middle>"}
    body = (await http(make_app(replica, text=text)).post(TEXT, json=asked)).json()
    assert [choice["text"] for choice in body["choices"]] == [ANSWER, ANSWER]
    ids = [request.prompt_token_ids for request in replica.requests]
    assert [[text.token_at(token_id) for token_id in each if token_id in text.control_ids] for each in ids] == [
        marks
    ] * 2
    assert text.decode(ids[0]) == "def f(): <fim_middle>"
