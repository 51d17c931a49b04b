"""A model's reasoning in OpenAI's schema: a field of its own, counted, and the same in a stream and whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fake_replica import FakeReplica, Script, card
from small_tokenizers import CHATML, chat_tokenizer
from starlette.applications import Starlette

from serve_app.api.openai.chat import ChatRequest, chat_options
from serve_app.api.unknown_fields import UnknownFields
from serve_app.chat.tokenizer import ChatTokenizer
from serve_app.observability.logs import RequestRecord

THINKS = "{% if false %}</think>{% endif %}" + CHATML
"""A template that knows the mark, as those that cut the reasoning out of earlier answers."""
HI: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
URL = "/v1/chat/completions"


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    """A tokenizer whose template knows reasoning."""
    return chat_tokenizer(tmp_path_factory.mktemp("thinker"), THINKS)


@pytest.fixture
def thinking(
    writes: Callable[..., Script],
    thinker: ChatTokenizer,
    make_app: Callable[..., Starlette],
    http: Callable[[Starlette], httpx.AsyncClient],
) -> httpx.AsyncClient:
    replica = FakeReplica(
        [writes("<think>\nHm, a greeting.\n</think>\n\nHello!")], state=card(vocab_size=thinker.vocab_size)
    )
    return http(make_app(replica, text=thinker))


async def test_reasoning_has_a_field_of_its_own(thinking: httpx.AsyncClient) -> None:
    body = (await thinking.post(URL, json=HI)).json()
    message = body["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == ("Hello!", "Hm, a greeting.")
    assert message["reasoning"] == message["reasoning_content"]
    usage = body["usage"]
    assert 0 < usage["completion_tokens_details"]["reasoning_tokens"] < usage["completion_tokens"]


@pytest.mark.parametrize("headers", [{}, {"x-stream-resume": "1"}])
async def test_a_stream_tells_the_same(thinking: httpx.AsyncClient, headers: dict[str, str]) -> None:
    text = (await thinking.post(URL, json={**HI, "stream": True}, headers=headers)).text
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: {")]
    deltas = [json.loads(line)["choices"][0]["delta"] for line in lines]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hm, a greeting."
    assert "".join(delta.get("content") or "" for delta in deltas) == "Hello!"


async def test_reasoning_may_be_left_out_or_be_a_part_of_the_content(thinking: httpx.AsyncClient) -> None:
    hidden = (await thinking.post(URL, json={**HI, "include_reasoning": False})).json()
    message = hidden["choices"][0]["message"]
    assert (message["content"], "reasoning" in message) == ("Hello!", False)
    assert hidden["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
    whole = (await thinking.post(URL, json={**HI, "separate_reasoning": False})).json()
    assert whole["choices"][0]["message"]["content"] == "<think>\nHm, a greeting.\n</think>\n\nHello!"


@pytest.mark.parametrize(
    ("fields", "variables", "ignored"),
    [
        ({"reasoning_effort": "none"}, {"enable_thinking": False}, []),
        ({"reasoning_effort": "low"}, {}, ["reasoning_effort"]),
        (
            {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}},
            {"enable_thinking": True},
            [],
        ),
        ({"chat_template_kwargs": {"enable_thinking": False}}, {"enable_thinking": False}, []),
    ],
)
def test_no_effort_turns_the_reasoning_off(
    fields: dict[str, Any], variables: dict[str, Any], ignored: list[str]
) -> None:
    record = RequestRecord("r1")
    unknown = UnknownFields(record, refused=False)
    options = chat_options(ChatRequest.model_validate({**HI, **fields}), {"enable_thinking"}, unknown)
    assert (dict(options.variables), record.ignored_fields) == (variables, ignored)


def test_where_reasoning_can_not_be_turned_off_the_field_is_ignored_and_named() -> None:
    record = RequestRecord("r1")
    request = ChatRequest.model_validate({**HI, "reasoning_effort": "none"})
    options = chat_options(request, set(), UnknownFields(record, refused=False))
    assert (options.variables, record.ignored_fields) == ({}, ["reasoning_effort"])
