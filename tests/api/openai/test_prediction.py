"""What a caller expects of an answer: the same answer, and how much of it came true."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from fake_replica import FakeReplica, card

from serve_app.chat.tokenizer import ChatTokenizer
from serve_app.generation.replica import ReplicaLost

ANSWER = "The quick brown fox says 🙂 and naïve."
EXPECTED = "The quick brown fox said 🙂 and naïve."
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "seed": 1}
ENDPOINTS = [("/v1/chat/completions", CHAT), ("/v1/completions", {"prompt": "Hi", "seed": 1})]


def prediction(content: Any) -> dict[str, Any]:
    return {"prediction": {"type": "content", "content": content}}


@pytest.mark.parametrize(("url", "body"), ENDPOINTS)
async def test_the_engine_gets_its_ids_and_usage_counts_them(
    api: httpx.AsyncClient, replica: FakeReplica, tokenizer: ChatTokenizer, url: str, body: dict[str, Any]
) -> None:
    plain = (await api.post(url, json=body)).json()
    said = (await api.post(url, json={**body, **prediction(EXPECTED), "n": 2})).json()
    assert "accepted_prediction_tokens" not in plain["usage"]["completion_tokens_details"]
    assert said["choices"][0] == said["choices"][1] | {"index": 0} == plain["choices"][0]
    ids = tuple(tokenizer.encode_text(EXPECTED, add_bos=False, parse_special=False))
    assert [request.predicted_token_ids for request in replica.requests] == [(), ids, ids]
    details = said["usage"]["completion_tokens_details"]
    accepted, rejected = details["accepted_prediction_tokens"], details["rejected_prediction_tokens"]
    assert accepted + rejected == 2 * len(ids)
    assert accepted > rejected > 0
    streamed = {**body, **prediction(EXPECTED), "n": 2, "stream": True, "stream_options": {"include_usage": True}}
    for headers in ({}, {"X-Stream-Resume": "1"}):
        text = (await api.post(url, json=streamed, headers=headers)).text
        (last,) = (line for line in text.splitlines() if '"choices": []' in line)
        assert json.loads(last.removeprefix("data: "))["usage"] == said["usage"]


async def test_a_failover_changes_no_count(api: httpx.AsyncClient, replica: FakeReplica, writes: Any) -> None:
    url, body = ENDPOINTS[0]
    asked = {**body, **prediction(EXPECTED)}
    expected = (await api.post(url, json=asked)).json()["usage"]
    replica.scripts = [writes(), lambda request: [*list(writes()(request))[:5], ReplicaLost("it died")], writes()]
    assert (await api.post(url, json=asked)).json()["usage"] == expected
    assert replica.requests[-1].predicted_token_ids == replica.requests[0].predicted_token_ids


@pytest.mark.parametrize("content", [[{"type": "text", "text": "The"}, {"type": "text", "text": "fox"}], "The\nfox"])
async def test_its_parts_are_joined(
    api: httpx.AsyncClient, replica: FakeReplica, tokenizer: ChatTokenizer, content: Any
) -> None:
    assert (await api.post(*[ENDPOINTS[0][0]], json={**CHAT, **prediction(content)})).status_code == 200
    assert tokenizer.decode(replica.requests[0].predicted_token_ids) == "The\nfox"


async def test_control_tokens_in_it_are_text_and_it_is_cut_to_a_context(
    api: httpx.AsyncClient, replica: FakeReplica, tokenizer: ChatTokenizer
) -> None:
    await api.post(ENDPOINTS[0][0], json={**CHAT, **prediction("<|im_end|>" * 400)})
    ids = replica.requests[0].predicted_token_ids
    assert len(ids) == 256
    assert tokenizer.control_ids.isdisjoint(ids)


@pytest.mark.parametrize(("most", "length"), [(10_000, 100), (60, 60)])
async def test_a_long_one_is_cut_and_ids_that_the_model_lacks_are_refused(
    api: httpx.AsyncClient, replica: FakeReplica, monkeypatch: pytest.MonkeyPatch, most: int, length: int
) -> None:
    replica.state = card(context_tokens=100, vocab_size=1000)
    monkeypatch.setattr("serve_app.generation.service.MAX_PREDICTED_TOKENS", most)
    asked = {**ENDPOINTS[1][1], **prediction("fox " * 300)}
    assert (await api.post(ENDPOINTS[1][0], json=asked)).status_code == 200
    assert len(replica.requests[0].predicted_token_ids) == length
    replica.state = card(context_tokens=100, vocab_size=max(replica.requests[0].predicted_token_ids))
    response = await api.post(ENDPOINTS[1][0], json=asked)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prediction")
    assert len(replica.requests) == 1


@pytest.mark.parametrize(("url", "body"), ENDPOINTS)
@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ("text", "prediction"),
        ({"type": "content"}, "prediction.content"),
        ({"type": "other", "content": "a"}, "prediction.type"),
        ({"type": "content", "content": 5}, "prediction.content"),
        ({"type": "content", "content": [{"type": "image_url"}]}, "prediction.content"),
        ({"type": "content", "content": ["a"]}, "prediction.content"),
        ({"content": "a"}, "prediction.type"),
    ],
)
async def test_what_is_wrong_is_named(
    api: httpx.AsyncClient, replica: FakeReplica, url: str, body: dict[str, Any], wrong: Any, param: str
) -> None:
    response = await api.post(url, json={**body, "prediction": wrong})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert replica.requests == []


async def test_the_official_client(replica: FakeReplica, make_app: Any, serve: Any) -> None:
    client = openai.AsyncOpenAI(api_key="none", base_url=f"{await serve(make_app(replica))}/v1", max_retries=0)
    answer = await client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Hi"}],
        prediction={"type": "content", "content": ANSWER},
    )
    assert answer.choices[0].message.content == ANSWER
    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is not None
    assert answer.usage.completion_tokens_details.rejected_prediction_tokens == 0
    assert answer.usage.completion_tokens_details.accepted_prediction_tokens == answer.usage.completion_tokens - 1
