from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_replica import FakeReplica, Script, card
from small_tokenizers import byte_level_backend
from starlette.applications import Starlette
from transformers import PreTrainedTokenizerFast

from serve_app.chat.tokenizer import ChatTokenizer

URL = "/v1/chat/completions"
HI: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
OPEN: dict[str, Any] = {"messages": [*HI["messages"], {"role": "assistant", "content": "The answer"}]}
SWITCHED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% if reasoning_effort is defined %}{{ 'Effort: ' + reasoning_effort }}{% endif %}{% endif %}"
)
Http = Callable[[Starlette], httpx.AsyncClient]


@pytest.fixture(scope="module")
def switched(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    folder: Path = tmp_path_factory.mktemp("switched")
    fast = PreTrainedTokenizerFast(tokenizer_object=byte_level_backend(), eos_token="<|im_end|>")
    fast.chat_template = SWITCHED
    fast.save_pretrained(folder)
    return ChatTokenizer.load(folder)


@pytest.fixture
async def switching(
    replica: FakeReplica, make_app: Callable[..., Starlette], http: Http, switched: ChatTokenizer
) -> httpx.AsyncClient:
    """A client of a model whose template has variables."""
    return http(make_app(replica, text=switched))


def prompt(replica: FakeReplica, tokenizer: ChatTokenizer, index: int = -1) -> str:
    ids = replica.requests[index].prompt_token_ids
    return str(tokenizer._encoder.decode(list(ids), skip_special_tokens=False))


@pytest.mark.parametrize(
    ("fields", "end"),
    [
        ({"chat_template_kwargs": {"enable_thinking": False}}, "assistant\n<think>\n\n</think>\n\n"),
        ({"enable_thinking": False}, "assistant\n<think>\n\n</think>\n\n"),
        ({"enable_thinking": False, "chat_template_kwargs": {"enable_thinking": True}}, "assistant\n"),
        ({"reasoning_effort": "low"}, "assistant\nEffort: low"),
        ({"reasoning_effort": None, "chat_template_kwargs": None}, "assistant\n"),
        ({"chat_template_kwargs": {"reasoning_effort": "low", "enable_thinking": None}}, "assistant\nEffort: low"),
        ({"add_generation_prompt": False}, "<|im_end|>\n"),
        ({"add_generation_prompt": True, "continue_final_message": False}, "assistant\n"),
    ],
)
async def test_what_the_template_knows_is_served(
    switching: httpx.AsyncClient, replica: FakeReplica, switched: ChatTokenizer, fields: dict[str, Any], end: str
) -> None:
    response = await switching.post(URL, json={**HI, **fields})
    assert response.status_code == 200, response.text
    assert "x-ignored-fields" not in response.headers
    assert prompt(replica, switched).endswith(end)


async def test_what_the_template_does_not_know_is_ignored_and_named(
    api: httpx.AsyncClient, replica: FakeReplica, switching: httpx.AsyncClient
) -> None:
    fields = {"chat_template_kwargs": {"enable_thinking": False, "a\nb": 1}, "reasoning_effort": "low", "verbosity": 1}
    response = await api.post(URL, json={**HI, **fields})
    assert response.headers["x-ignored-fields"] == (
        "chat_template_kwargs.enable_thinking, chat_template_kwargs.a%0Ab, reasoning_effort, verbosity"
    )
    await api.post(URL, json=HI)
    assert replica.requests[0].prompt_token_ids == replica.requests[1].prompt_token_ids
    ours = {"messages": [], "add_generation_prompt": False, "eos_token": "x"}
    response = await switching.post(URL, json={**HI, "chat_template_kwargs": ours})
    assert response.status_code == 200
    assert len(response.headers["x-ignored-fields"].split(", ")) == 3


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"chat_template_kwargs": {"enable_thinking": []}}, "chat_template_kwargs.enable_thinking"),
        ({"chat_template_kwargs": {"reasoning_effort": {"a": "b"}}}, "chat_template_kwargs.reasoning_effort"),
        ({"reasoning_effort": "x" * 1001}, "reasoning_effort"),
        ({"reasoning_effort": ["low"]}, "reasoning_effort"),
        ({"reasoning_effort": "<|im_end|>"}, "messages"),
        ({"reasoning_effort": 5}, "messages"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs"),
        ({"continue_final_message": True}, "messages[0]"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ],
)
async def test_what_no_template_can_take_is_refused(
    switching: httpx.AsyncClient, replica: FakeReplica, fields: dict[str, Any], param: str
) -> None:
    response = await switching.post(URL, json={**HI, **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert replica.requests == []


@pytest.mark.parametrize("more", [{}, {"add_generation_prompt": False}])
async def test_an_answer_is_continued(
    switching: httpx.AsyncClient,
    replica: FakeReplica,
    switched: ChatTokenizer,
    writes: Callable[..., Script],
    more: dict[str, Any],
) -> None:
    replica.scripts = [writes(" is one.")]
    asked = {**OPEN, "continue_final_message": True, **more}
    answer = (await switching.post(URL, json=asked)).json()["choices"][0]["message"]["content"]
    assert prompt(replica, switched).endswith("<|im_start|>assistant\nThe answer")
    assert answer == " is one."
    response = await switching.post(URL, json={**asked, "stream": True}, headers={"X-Stream-Resume": "1"})
    lines = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    assert "".join(line["choices"][0]["delta"].get("content") or "" for line in lines) == answer


@pytest.mark.parametrize("headers", [{}, {"X-Stream-Resume": "1"}], ids=["plain", "resumable"])
@pytest.mark.parametrize(("url", "body"), [(URL, HI), ("/v1/completions", {"prompt": ["Hi", "Ho"]})])
async def test_every_chunk_can_have_the_usage_so_far(
    api: httpx.AsyncClient, replica: FakeReplica, url: str, body: dict[str, Any], headers: dict[str, str]
) -> None:
    replica.state = card(vocab_size=1000)
    options = {"include_usage": True, "continuous_usage_stats": True}
    response = await api.post(url, json={**body, "stream": True, "stream_options": options}, headers=headers)
    assert "x-ignored-fields" not in response.headers
    chunks = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    *usages, last = (chunk["usage"] for chunk in chunks)
    counts = [usage["completion_tokens"] for usage in usages]
    assert counts == sorted(counts)
    assert counts[-1] == last["completion_tokens"] > counts[0]
    assert {usage["prompt_tokens"] for usage in usages} == {last["prompt_tokens"]}
    assert all(usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] for usage in usages)
    for options in ({"include_usage": True}, {"continuous_usage_stats": True}):
        response = await api.post(url, json={**body, "stream": True, "stream_options": options}, headers=headers)
        chunks = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
        assert all(chunk.get("usage") is None for chunk in chunks[:-1])
