"""What real clients send: requests recorded from their packages (`client_requests/*.json`) are served as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_replica import FakeReplica, card

from serve_app.chat.tokenizer import ChatTokenizer

ANSWER = "The quick brown fox says 🙂 and naïve."
RECORDINGS = sorted((Path(__file__).parent / "client_requests").glob("*.json"))
IGNORED = {
    ("open_webui", 0): {"keep_alive", "num_ctx", "reasoning_effort", "messages[].reasoning_content"},
    ("litellm", 0): {"messages[].reasoning_content"},
    ("litellm", 1): {"reasoning_effort"},
    ("ai_sdk", 0): {"reasoning_effort", "messages[].reasoning_content"},
}
"""(client, request) -> the fields that the answer's header has to name."""


def recorded() -> list[Any]:
    """Every request of every client, as a pytest parameter."""
    found = []
    for file in RECORDINGS:
        for number, request in enumerate(json.loads(file.read_text(encoding="utf-8"))["requests"]):
            found.append(pytest.param(file.stem, number, request, id=f"{file.stem}-{number}"))
    return found


def text_of(response: httpx.Response, *, streamed: bool) -> str:
    """The answer's text, from one JSON object or from the chunks of a stream that ends with [DONE]."""
    if not streamed:
        (choice,) = response.json()["choices"]
        return str(choice["message"]["content"] if "message" in choice else choice["text"])
    *blocks, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    choices = [choice for block in blocks for choice in json.loads(block.removeprefix("data: "))["choices"]]
    return "".join(choice["delta"].get("content") or "" if "delta" in choice else choice["text"] for choice in choices)


@pytest.fixture
def replica(writes: Any, tokenizer: ChatTokenizer) -> FakeReplica:
    return FakeReplica(
        [writes()], state=card(name="SmolLM2-135M-Instruct", vocab_size=tokenizer.vocab_size, context_tokens=2048)
    )


def test_nine_clients_were_recorded() -> None:
    names = ["ai_sdk", "cline", "continue", "langchain", "librechat", "litellm", "llama_index", "lm_eval", "open_webui"]
    assert [file.stem for file in RECORDINGS] == names


@pytest.mark.parametrize(("client", "number", "request_"), recorded())
async def test_a_recorded_request_is_served(
    client: str, number: int, request_: dict[str, Any], api: httpx.AsyncClient, replica: FakeReplica
) -> None:
    body = request_["body"]
    response = await api.post(request_["path"], headers=request_["headers"], content=json.dumps(body))

    assert response.status_code == 200, response.text
    assert text_of(response, streamed=body.get("stream", False)) == ANSWER
    named = response.headers.get("x-ignored-fields", "")
    assert {name.strip() for name in named.split(",") if name} == IGNORED.get((client, number), set())
