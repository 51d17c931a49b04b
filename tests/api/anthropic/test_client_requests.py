"""What real clients send to Anthropic's endpoint (`client_requests/*.json`) is served as it is."""

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
    ("litellm", 4): {"thinking", "thinking.budget_tokens", "messages[].content[].reasoning_content"},
}
"""(client, request) -> the fields that the answer's header has to name."""


def recorded() -> list[Any]:
    """Every request of every client, as a pytest parameter."""
    found = []
    for file in RECORDINGS:
        for number, request in enumerate(json.loads(file.read_text(encoding="utf-8"))["requests"]):
            found.append(pytest.param(file.stem, number, request, id=f"{file.stem}-{number}"))
    return found


@pytest.fixture
def replica(writes: Any, tokenizer: ChatTokenizer) -> FakeReplica:
    state = card(name="SmolLM2-135M-Instruct", vocab_size=tokenizer.vocab_size, context_tokens=8192)
    return FakeReplica([writes()], state=state)


def test_these_clients_were_recorded() -> None:
    assert [file.stem for file in RECORDINGS] == ["claude_code", "litellm"]


@pytest.mark.parametrize(("client", "number", "request_"), recorded())
async def test_a_recorded_request_is_served(
    client: str, number: int, request_: dict[str, Any], api: httpx.AsyncClient, replica: FakeReplica
) -> None:
    body = request_["body"]
    response = await api.post(request_["path"], headers=request_["headers"], content=json.dumps(body))
    assert response.status_code == 200, response.text
    named = response.headers.get("x-ignored-fields", "")
    assert {name.strip() for name in named.split(",") if name} == IGNORED.get((client, number), set())
    assert replica.requests[0].max_new_tokens <= body["max_tokens"]
    if not body.get("stream"):
        said = "".join(block["text"] for block in response.json()["content"])
        assert said == ANSWER or (body["max_tokens"] == 1 and ANSWER.startswith(said))
        return
    data: list[dict[str, Any]] = [
        json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: ")
    ]
    assert "".join(event.get("delta", {}).get("text", "") for event in data) == ANSWER
