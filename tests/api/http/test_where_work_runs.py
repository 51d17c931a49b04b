"""What of a request runs in the event loop, and what in a thread: by where it runs, not by how long it takes."""

from __future__ import annotations

import json
import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fake_replica import FakeReplica, card
from pydantic import ValidationError

from serve_app.api import fields, native, respond
from serve_app.api.errors import ApiError
from serve_app.api.http.endpoint import INLINE_BYTES
from serve_app.api.openai import chat, completions
from serve_app.chat.prompts import PromptFormatter
from serve_app.chat.tokenizer import ChatTokenizer

Where = dict[str, set[str]]
Ask = Callable[[dict[str, Any]], Any]


@pytest.fixture
def where(monkeypatch: pytest.MonkeyPatch) -> Where:
    """Function -> where it ran: "loop", "thread"."""
    seen: Where = defaultdict(set)
    loop = threading.get_ident()

    def watch(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            seen[name].add("loop" if threading.get_ident() == loop else "thread")
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    watch(PromptFormatter, "render_text")
    watch(PromptFormatter, "render_chat")
    watch(native, "validate")
    watch(chat, "validate_open")
    watch(chat, "chat_options")
    watch(completions, "validate_open")
    watch(chat.ChatFormat, "_whole")
    return seen


@pytest.fixture
def replica(writes: Any, tokenizer: ChatTokenizer) -> FakeReplica:
    """Answers anything, however long."""
    state = card(vocab_size=tokenizer.vocab_size, context_tokens=10**6, kv_capacity_tokens=10**6)
    return FakeReplica([writes()], state=state)


SHORT = "The quick fox. " * 60


@pytest.mark.parametrize(
    ("path", "small", "large"),
    [
        ("/v1/completions", {"prompt": SHORT}, {"prompt": [SHORT] * 32}),
        ("/v1/completions", {"prompt": [1] * 100}, {"prompt": [[1] * 2000] * 8}),
        ("/stream", {"prompt": SHORT}, {"prompt": SHORT * 32}),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": SHORT}]},
            {"messages": [{"role": "user", "content": SHORT}] * 31},
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": SHORT}]}]},
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 1000}]},
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "a"}]},
            {"messages": [{"role": "user", "content": "a", **dict.fromkeys(map(str, range(3000)))}]},
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"b": 1}},
            {
                "messages": [{"role": "user", "content": "a"}],
                "chat_template_kwargs": dict.fromkeys(map(str, range(3000))),
            },
        ),
    ],
)
async def test_the_size_of_the_whole_request_decides(
    path: str, small: dict[str, Any], large: dict[str, Any], api: httpx.AsyncClient, where: Where
) -> None:
    for body, place in ((small, "loop"), (large, "thread")):
        where.clear()
        answer = await api.post(path, json=body)
        assert answer.status_code == 200, answer.text
        whole = where.pop("_whole", {"loop"})
        assert whole == {"loop"}, "a short answer"
        assert set(map(frozenset, where.values())) == {frozenset({place})}
        assert len(json.dumps(large)) > INLINE_BYTES


@pytest.mark.parametrize("url", ["/stream", "/v1/chat/completions"])
@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": [1] * 100_000}, "messages[0]"),
        ({"messages": [{}, *[None] * 100_000]}, "messages[1]"),
        ({"messages": [{"a": 1}] * 3, **dict.fromkeys(map(str, range(90_000)), 1), "top_p": "x"}, None),
    ],
    ids=["no messages", "one message", "no fields"],
)
async def test_one_error_is_enough(
    api: httpx.AsyncClient, url: str, body: dict[str, Any], param: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pydantic holds Python's lock while it describes them all: in a thread too, nothing else runs."""
    described = 0
    from_validation = fields.from_validation

    def counted(error: ValidationError) -> ApiError:
        nonlocal described
        described = error.error_count()
        return from_validation(error)

    monkeypatch.setattr(fields, "from_validation", counted)
    response = await api.post(url, json=body)
    assert response.status_code == 400
    expected = param or {"/stream": "0", "/v1/chat/completions": "top_p"}[url]
    assert response.json()["error"]["param"] == expected
    assert described <= 1


async def test_many_short_messages_are_rendered_in_a_thread(api: httpx.AsyncClient, where: Where) -> None:
    """A template costs more for each message than for the letters in it."""
    messages = [{"role": "user", "content": "a"}] * 400
    assert len(json.dumps({"messages": messages})) < INLINE_BYTES
    assert (await api.post("/v1/chat/completions", json={"messages": messages})).status_code == 200
    assert where["render_chat"] == {"thread"}


async def test_a_long_answer_is_written_in_a_thread_and_is_the_same(
    api: httpx.AsyncClient, where: Where, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {
        "messages": [{"role": "user", "content": "Hi"}], "n": 8, "seed": 1, "logprobs": True, "top_logprobs": 20
    }  # fmt: skip
    long = (await api.post("/v1/chat/completions", json=body)).json()
    assert where["_whole"] == {"thread"}
    entries = sum(len(choice["logprobs"]["content"]) for choice in long["choices"]) * 21
    assert entries > respond.INLINE_ENTRIES
    where.clear()
    monkeypatch.setattr(respond, "INLINE_ENTRIES", entries * 2)
    whole = (await api.post("/v1/chat/completions", json=body)).json()
    assert where["_whole"] == {"loop"}
    assert [whole["choices"], whole["usage"]] == [long["choices"], long["usage"]]
