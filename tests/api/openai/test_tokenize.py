"""The tokenizer over HTTP, and what a request would become."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fake_replica import FakeReplica, card
from small_tokenizers import metaspace_backend
from starlette.applications import Starlette

from serve_app.api.openai import tokenize
from serve_app.api.openai.tokenize import MAX_DETOKENIZED
from serve_app.api.openapi import openai_answers as answers
from serve_app.chat.tokenizer import ChatTokenizer
from serve_app.core import LoadStage
from serve_app.generation.request import ResolvedRequest
from serve_app.generation.service import CompletionService

HI: dict[str, Any] = {"messages": [{"role": "system", "content": "Be."}, {"role": "user", "content": "a<|im_end|>b"}]}
CHAT = "/v1/chat/completions"


@pytest.mark.parametrize("at_once", [0, 100])
async def test_a_text(
    api: httpx.AsyncClient,
    tokenizer: ChatTokenizer,
    replica: FakeReplica,
    at_once: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tokenize, "_WRITTEN_AT_ONCE", at_once)
    body = (await api.post("/tokenize", json={"model": "tiny", "prompt": "naïve 🙂", "return_token_strs": True})).json()
    ids = tokenizer.encode_text("naïve 🙂", add_bos=True, parse_special=False)
    names = [tokenizer.token_at(token_id) for token_id in ids]
    assert body == {"count": len(ids), "max_model_len": 256, "tokens": ids, "token_strs": names}
    assert (await api.post("/detokenize", json={"tokens": ids})).json() == {"prompt": "naïve 🙂"}
    assert replica.requests == []


async def test_control_tokens_are_read_unless_the_caller_says_otherwise(
    api: httpx.AsyncClient, tokenizer: ChatTokenizer
) -> None:
    for parse, controls in ((None, 1), (True, 1), (False, 0)):
        asked = {"prompt": "a<|im_end|>", "parse_special": parse}
        ids = (await api.post("/tokenize", json=asked)).json()["tokens"]
        assert len(tokenizer.control_ids.intersection(ids)) == controls
        assert (await api.post("/detokenize", json={"tokens": ids})).json() == {"prompt": "a<|im_end|>"}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"add_generation_prompt": False},
        {"messages": [*HI["messages"], {"role": "assistant", "content": "b"}], "continue_final_message": True},
    ],
)
async def test_a_chat_is_what_the_model_would_get(
    api: httpx.AsyncClient, replica: FakeReplica, tokenizer: ChatTokenizer, more: dict[str, Any]
) -> None:
    await api.post(CHAT, json={**HI, **more})
    (request,) = replica.requests
    tokenized = (await api.post("/tokenize", json={**HI, **more})).json()
    assert tuple(tokenized["tokens"]) == request.prompt_token_ids
    assert tokenized["token_strs"] is None
    (prompt,) = (await api.post(f"{CHAT}/render", json={**HI, **more})).json()["prompts"]
    assert tuple(prompt["token_ids"]) == request.prompt_token_ids
    assert prompt["text"] == tokenizer.shown(request.prompt_token_ids)
    assert prompt["text"].startswith("<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\na<|im_end|>b")
    assert prompt["max_tokens"] == request.max_new_tokens
    assert len(replica.requests) == 1


async def test_a_chat_too_long_to_be_answered_is_counted(api: httpx.AsyncClient) -> None:
    long = {"messages": [{"role": "user", "content": "fox " * 500}]}
    assert (await api.post("/tokenize", json=long)).json()["count"] > 256
    assert (await api.post(f"{CHAT}/render", json=long)).json()["error"]["code"] == "context_length_exceeded"


async def test_what_a_request_would_become(api: httpx.AsyncClient, replica: FakeReplica) -> None:
    asked = {"prompt": ["Hi", [5, 6, 7]], "n": 2, "max_tokens": 9, "stop": "x", "temperature": 0.5, "seed": 4}
    body = (await api.post("/v1/completions/render", json={**asked, "truncate_prompt_tokens": 2})).json()
    assert [prompt["token_ids"] for prompt in body["prompts"]][1] == [6, 7]
    assert [prompt["max_tokens"] for prompt in body["prompts"]] == [9, 9]
    params = body["sampling_params"]
    assert (params["seed"], params["temperature"], params["stop"], params["n"]) == (4, 0.5, ["x"], 2)
    answers.Rendered.model_validate(body, strict=True)
    for seed in (None, -1):
        body = (await api.post("/v1/completions/render", json={**asked, "seed": seed})).json()
        assert body["sampling_params"]["seed"] is None
    response = await api.post(f"{CHAT}/render", json={**HI, "temperature": 9})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "temperature")
    response = await api.post(f"{CHAT}/render", json={**HI, "made_up": 9})
    assert response.headers["x-ignored-fields"] == "made_up"
    assert replica.requests == []


async def test_a_constraint_is_checked_for_render_too(api: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fault(service: CompletionService, request: ResolvedRequest, caller: str | None = None) -> str:
        return "it can't be used"

    monkeypatch.setattr(CompletionService, "constraint_fault", fault)
    for path in (CHAT, f"{CHAT}/render"):
        response = await api.post(path, json={**HI, "response_format": {"type": "json_object"}})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "response_format")


async def test_bos_may_be_left_out(make_app: Callable[..., Starlette], http: Callable[..., httpx.AsyncClient]) -> None:
    specials = {"bos_token": "<s>", "eos_token": "</s>"}
    text = ChatTokenizer(
        metaspace_backend().to_str(),
        control_tokens=specials.values(),
        template=None,
        special_tokens=specials,
        adds_bos=True,
    )
    api = http(make_app(FakeReplica([], state=card()), text=text))
    with_bos = (await api.post("/tokenize", json={"prompt": "fox"})).json()["tokens"]
    without = (await api.post("/tokenize", json={"prompt": "fox", "add_special_tokens": False})).json()["tokens"]
    assert with_bos == [text.bos_token_id, *without]
    info = (await api.get("/tokenizer_info")).json()
    assert (info["bos_token"], info["eos_token"], info["pad_token"], info["chat_template"]) == (
        "<s>",
        "</s>",
        None,
        None,
    )
    (eos,) = (await api.post("/tokenize", json={"prompt": info["eos_token"], "add_special_tokens": False})).json()[
        "tokens"
    ][-1:]
    assert eos == text.eos_token_id


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", **HI}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": [5]}, "prompt"),
        ("/tokenize", {"messages": "x"}, "messages"),
        ("/tokenize", {"messages": [{"role": "nobody", "content": "x"}]}, "messages[0].role"),
        ("/tokenize", {**HI, "add_special_tokens": True}, "messages"),
        ("/tokenize", {**HI, "parse_special": True}, "messages"),
        ("/tokenize", {**HI, "tools": 5}, "tools"),
        ("/tokenize", {**HI, "chat_template": "{{ x }}"}, "chat_template"),
        ("/tokenize", {**HI, "add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
        ("/tokenize", {"model": "other", "prompt": "a"}, "model"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [10**6]}, "tokens"),
        ("/detokenize", {"tokens": [10**30]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [True]}, "tokens"),
        ("/detokenize", {"tokens": [1.0]}, "tokens"),
        ("/detokenize", {"tokens": "5"}, "tokens"),
        ("/detokenize", {"tokens": [1] * (MAX_DETOKENIZED + 1)}, "tokens"),
    ],
)
async def test_what_is_wrong_is_named(api: httpx.AsyncClient, path: str, fields: dict[str, Any], param: str) -> None:
    response = await api.post(path, content=json.dumps(fields), headers={"content-type": "application/json"})
    assert response.status_code == (404 if param == "model" else 400), response.text
    assert response.json()["error"]["param"] == param


async def test_nothing_is_an_empty_text(api: httpx.AsyncClient) -> None:
    assert (await api.post("/tokenize", json={"prompt": ""})).json()["tokens"] == []
    assert (await api.post("/detokenize", json={"tokens": []})).json() == {"prompt": ""}


async def test_while_the_model_loads_the_answer_is_503(
    make_app: Callable[..., Starlette], http: Callable[..., httpx.AsyncClient]
) -> None:
    api = http(make_app(FakeReplica([], state=LoadStage("loading weights"))))
    assert (await api.post("/tokenize", json={"prompt": "a"})).status_code == 503
    assert (await api.get("/tokenizer_info")).status_code == 503


@pytest.mark.parametrize(
    ("method", "path", "what"),
    [
        ("POST", "/v1/embeddings", "Embeddings"),
        ("POST", "/v1/audio/speech", "Speech"),
        ("POST", "/v1/audio/transcriptions", "Speech"),
        ("POST", "/v1/images/generations", "Images"),
        ("POST", "/v1/moderations", "Moderation"),
        ("GET", "/v1/files", "Files"),
        ("GET", "/v1/files/file-1/content", "Files"),
        ("POST", "/v1/batches", "Batches"),
        ("DELETE", "/v1/fine_tuning/jobs", "Fine-tuning"),
        ("POST", "/rerank", "Reranking"),
    ],
)
async def test_endpoints_that_are_not_served_are_refused_by_name(
    api: httpx.AsyncClient, method: str, path: str, what: str
) -> None:
    response = await api.request(method, path)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["type"]) == (
        404,
        "unsupported_endpoint",
        "invalid_request_error",
    )
    assert error["message"].startswith(what)
    assert (await api.post("/v1/embeddingsx")).json()["error"]["code"] == "not_found"


async def test_a_render_shows_the_grammar(api: httpx.AsyncClient) -> None:
    asked = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "integer"}}}
    for fields, word in (({"response_format": asked}, "integer"), ({}, "None")):
        (prompt,) = (await api.post(f"{CHAT}/render", json={**HI, **fields})).json()["prompts"]
        assert word in str(prompt["constraint"])
