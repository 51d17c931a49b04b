from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fake_replica import ALIVE, FakeReplica, Script, card, says, tokens

from serve_app.chat.tokenizer import ChatTokenizer
from serve_app.core import Failure, FailureCode, FinishReason
from serve_app.generation.replica import ReplicaLost

ANSWER = "The quick brown fox says 🙂 and naïve."


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    """(event name, its data) of a stream without comments."""
    found = []
    for block in text.split("\n\n")[:-1]:
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        found.append((fields.get("event", "message"), json.loads(fields["data"])))
    return found


def written(text: str) -> str:
    return "".join(data["generated_text"] for name, data in events(text) if name == "message")


HI = {"messages": [{"role": "user", "content": "Hi"}]}


async def test_a_chat_streams_one_event_a_token_and_ends_with_done(
    api: httpx.AsyncClient, replica: FakeReplica, tokenizer: ChatTokenizer, eos: int
) -> None:
    response = await api.post("/stream", json={**HI, "seed": 7})
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache, no-transform"
    assert response.headers["x-accel-buffering"] == "no"
    *documents, (last, done) = events(response.text)
    ids = [data["token_id"] for _, data in documents]
    assert ids == [*tokenizer.encode_text(ANSWER, add_bos=False, parse_special=False), eos]
    assert all(set(data) == {"token_id", "generated_text"} for _, data in documents)
    assert written(response.text) == ANSWER
    assert documents[-1][1] == {"token_id": eos, "generated_text": ""}
    prompt = tokenizer.encode_text(
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", add_bos=False, parse_special=True
    )
    assert replica.requests[0].prompt_token_ids == tuple(prompt)
    assert last == "done"
    assert done == {
        "finish_reason": "stop",
        "usage": {
            "prompt_tokens": len(prompt),
            "completion_tokens": len(ids),
            "total_tokens": len(prompt) + len(ids),
            "prompt_tokens_details": {"cached_tokens": 2},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
        "seed": 7,
    }


async def test_a_prompt_is_continued(api: httpx.AsyncClient, replica: FakeReplica, tokenizer: ChatTokenizer) -> None:
    response = await api.post("/stream", json={"prompt": "Once <|im_end|>"})
    assert written(response.text) == ANSWER
    ids = replica.requests[0].prompt_token_ids
    assert tokenizer.control_ids.isdisjoint(ids)
    await api.post("/stream", json={"prompt": "Once <|im_end|>", "parse_special": True})
    assert not tokenizer.control_ids.isdisjoint(replica.requests[1].prompt_token_ids)


async def test_get_takes_the_same_from_its_query(api: httpx.AsyncClient, replica: FakeReplica) -> None:
    query = {
        "prompt": "Hi",
        "max_tokens": 5,
        "temperature": "0.5",
        "top_p": 1,
        "top_k": 3,
        "seed": 9,
        "stop": ["#", "%"],
    }
    response = await api.get("/stream", params=query)
    assert response.status_code == 200
    request = replica.requests[0]
    assert request.max_new_tokens == 5
    assert (request.sampling.temperature, request.sampling.top_k, request.sampling.seed) == (0.5, 3, 9)
    name, done = events(response.text)[-1]
    assert (name, done["finish_reason"], done["usage"]["completion_tokens"]) == ("done", "length", 5)


async def test_a_cache_salt_reaches_the_replica(api: httpx.AsyncClient, replica: FakeReplica) -> None:
    await api.post("/stream", json={**HI, "cache_salt": "tenant 1"})
    await api.get("/stream", params={"prompt": "Hi", "cache_salt": "7"})
    await api.post("/stream", json={**HI, "cache_salt": None})
    assert [request.cache_salt for request in replica.requests] == ["tenant 1", "7", ""]


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("", "prompt"),
        ("prompt=Hi&cache_salt=", "cache_salt"),
        ("prompt=Hi&messages=[]", "messages"),
        ("prompt=Hi&temperature=nan", "temperature"),
        ("prompt=Hi&temperature=warm", "temperature"),
        ("prompt=Hi&max_tokens=0", "max_tokens"),
        ("prompt=Hi&max_tokens=1&max_tokens=2", "max_tokens"),
        ("prompt=Hi&max_tokens=1e9", "max_tokens"),
        ("prompt=Hi&surprise=1", "surprise"),
        ("prompt=", "prompt"),
    ],
)
async def test_get_refuses_with_the_field(api: httpx.AsyncClient, query: str, param: str) -> None:
    response = await api.get(f"/stream?{query}")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_a_seed_is_drawn_and_told(api: httpx.AsyncClient, replica: FakeReplica) -> None:
    seeds = [events((await api.post("/stream", json=HI)).text)[-1][1]["seed"] for _ in range(2)]
    assert seeds[0] != seeds[1]
    assert [request.sampling.seed for request in replica.requests] == seeds
    assert all(0 <= seed < 2**53 for seed in seeds)


async def test_a_negative_seed_has_the_same_64_bits(api: httpx.AsyncClient, replica: FakeReplica) -> None:
    await api.post("/stream", json={**HI, "seed": -2})
    assert replica.requests[0].sampling.seed == 2**64 - 2


async def test_the_default_of_max_tokens_is_cut_to_what_is_left(api: httpx.AsyncClient, replica: FakeReplica) -> None:
    replica.state = card(context_tokens=300, vocab_size=1000)
    await api.post("/stream", json=HI)
    assert replica.requests[0].max_new_tokens == 256
    replica.state = card(context_tokens=100, vocab_size=1000)
    await api.post("/stream", json=HI)
    assert replica.requests[1].max_new_tokens == 100 - len(replica.requests[1].prompt_token_ids)


@pytest.mark.parametrize("stop", ["fox", ["zebra", "fox", "x says"], "fox says 🙂 and"])
@pytest.mark.parametrize("batch", [1, 4, 100])
async def test_a_stop_string_ends_the_work(
    api: httpx.AsyncClient, replica: FakeReplica, writes: Callable[..., Script], stop: Any, batch: int
) -> None:
    replica.scripts = [writes(batch=batch, end=None)]
    response = await api.post("/stream", json={**HI, "stop": stop})
    first = min(ANSWER.index(text) for text in ([stop] if isinstance(stop, str) else stop) if text in ANSWER)
    assert written(response.text) == ANSWER[:first]
    done = events(response.text)[-1][1]
    assert done["finish_reason"] == "stop"
    assert done["usage"]["completion_tokens"] == len(events(response.text)) - 1
    assert replica.cancelled == 1


async def test_a_stop_string_that_never_comes_holds_nothing_back_in_the_end(api: httpx.AsyncClient) -> None:
    response = await api.post("/stream", json={**HI, "stop": "naïve.!"})
    assert written(response.text) == ANSWER


async def test_what_a_late_last_word_sets_free_goes_out_under_the_last_id(
    api: httpx.AsyncClient, replica: FakeReplica, tokenizer: ChatTokenizer
) -> None:
    (word,) = tokenizer.encode_text("x", add_bos=False, parse_special=False)
    replica.scripts = [says(tokens(0, word), 0.02, tokens(1, finish=FinishReason.LENGTH))]
    response = await api.post("/stream", json={**HI, "stop": "xyz"})
    assert [data for name, data in events(response.text) if name == "message"] == [
        {"token_id": word, "generated_text": ""},
        {"token_id": word, "generated_text": "x"},
    ]


async def test_a_lost_replica_is_a_pause(
    api: httpx.AsyncClient, replica: FakeReplica, writes: Callable[..., Script]
) -> None:
    replica.scripts = [lambda request: [*writes(end=None)(request)[:7], ReplicaLost("died")], writes()]
    response = await api.post("/stream", json=HI)
    assert written(response.text) == ANSWER
    assert len(replica.requests) == 2


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (FailureCode.CONTEXT_LENGTH_EXCEEDED, 400),
        (FailureCode.INVALID_REQUEST, 400),
        (FailureCode.OVERLOADED, 503),
        (FailureCode.NOT_READY, 503),
        (FailureCode.WRONG_WEIGHTS, 503),
        (FailureCode.DEADLINE_EXCEEDED, 504),
        (FailureCode.ENGINE_FAILED, 500),
    ],
)
async def test_a_refusal_is_a_real_status(
    api: httpx.AsyncClient, replica: FakeReplica, code: FailureCode, status: int
) -> None:
    replica.scripts = [says(Failure(code, "No.", retry_after_s=2.2 if status == 503 else None))]
    response = await api.post("/stream", json=HI)
    assert response.status_code == status
    error = response.json()["error"]
    assert (error["message"], error["code"]) == ("No.", str(code))
    assert response.headers.get("retry-after") == ("3" if status == 503 else None)
    assert response.headers.get("x-should-retry") == ("false" if status in (500, 504) else None)


@pytest.mark.parametrize("first", [True, False])
async def test_trouble_in_the_middle_is_an_event_and_the_end(
    api: httpx.AsyncClient, replica: FakeReplica, first: bool
) -> None:
    replica.scripts = [says(ALIVE if first else tokens(0, 50), 0.02, Failure(FailureCode.ENGINE_FAILED, "It broke."))]
    response = await api.post("/stream", json=HI)
    assert response.status_code == 200
    name, data = events(response.text)[-1]
    assert name == "error"
    assert data["error"] == {"message": "It broke.", "type": "server_error", "param": None, "code": "engine_failed"}


async def test_a_bug_in_the_middle_shows_no_traceback(api: httpx.AsyncClient, replica: FakeReplica) -> None:
    replica.scripts = [says(tokens(0, 50), 0.02, ZeroDivisionError("secret"))]
    response = await api.post("/stream", json=HI, headers={"x-request-id": "abc"})
    name, data = events(response.text)[-1]
    assert (name, data["error"]["code"]) == ("error", "internal_error")
    assert "abc" in data["error"]["message"]
    assert "secret" not in response.text


async def test_a_bug_before_the_start_is_a_500_without_a_traceback(
    api: httpx.AsyncClient, replica: FakeReplica, caplog: pytest.LogCaptureFixture
) -> None:
    replica.scripts = [says(ZeroDivisionError("secret"))]
    response = await api.post("/stream", json=HI, headers={"x-request-id": "abc"})
    assert response.status_code == 500
    assert response.headers["x-request-id"] == "abc"
    assert "abc" in response.json()["error"]["message"]
    assert "secret" not in response.text
    assert any(record.exc_info for record in caplog.records)
