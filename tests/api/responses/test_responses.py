"""POST /v1/responses and what is kept of it: one or two ingresses over one store, in front of scripted replicas."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from asgi_driver import Exchange
from fake_replica import FakeReplica, Script, card
from openai.types.responses import Response as OpenAIResponse
from responses_api import HI, create, events_of, text_of, until
from starlette.applications import Starlette

from serve_app.chat.tokenizer import ChatTokenizer
from serve_app.core import Failure, FailureCode, Fingerprint
from serve_app.generation.replica import ReplicaLost
from serve_app.resume.journal_store import JournalLimits
from serve_app.resume.memory_store import MemoryJournalStore

ANSWER = "The quick brown fox says 🙂 and naïve."
MakeApp = Callable[..., Starlette]
Http = Callable[[Starlette], httpx.AsyncClient]
Writes = Callable[..., Script]
Event = dict[str, Any]
RESUME = {"X-Stream-Resume": "1"}


@pytest.fixture
def store() -> MemoryJournalStore:
    return MemoryJournalStore(JournalLimits(lease_s=60))


async def test_a_response_is_openais_to_the_letter(api: httpx.AsyncClient) -> None:
    document = await create(
        api, instructions="Be brief.", metadata={"a": "b"}, temperature=0.5, top_p=0.9, max_output_tokens=50, user="u"
    )
    parsed = OpenAIResponse.model_validate(document, strict=True)
    assert set(document) - set(OpenAIResponse.model_fields) == {"store"}, "which OpenAI has, and its package lacks"
    assert parsed.output_text == ANSWER
    assert (parsed.status, parsed.store, parsed.background, parsed.error) == ("completed", True, False, None)
    assert (parsed.temperature, parsed.top_p, parsed.max_output_tokens) == (0.5, 0.9, 50)
    assert (parsed.instructions, parsed.metadata, parsed.user) == ("Be brief.", {"a": "b"}, "u")
    (message,) = parsed.output
    assert (message.type, message.status) == ("message", "completed")
    usage = parsed.usage
    assert usage is not None
    assert usage.input_tokens_details.cached_tokens == 2
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens > usage.output_tokens > 0


@pytest.mark.parametrize("kept", [True, False])
async def test_the_events_are_openais_and_end_with_the_document(api: httpx.AsyncClient, kept: bool) -> None:
    response = await api.post("/v1/responses", json={**HI, "stream": True, "store": kept})
    events = events_of(response.content)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["response"]["output"] for event in events[:2]] == [[], []]
    kinds = [event["type"] for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta") == ANSWER
    assert text_of(events[-1]["response"]) == ANSWER
    assert events[-1]["response"]["output"] == [events[-2]["item"]]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_response_that_is_not_kept_says_the_same_and_leaves_nothing(
    replica: FakeReplica, make_app: MakeApp, http: Http, store: MemoryJournalStore, stream: bool
) -> None:
    api = http(make_app(replica, kept=store))
    response = await api.post("/v1/responses", json={**HI, "store": False, "stream": stream})
    document = events_of(response.content)[-1]["response"] if stream else response.json()
    assert text_of(document) == ANSWER
    assert len(store.journals) == 0
    missing = await api.get(f"/v1/responses/{document['id']}")
    assert missing.status_code == 404


@pytest.mark.parametrize("batch", [1, 3, 100])
@pytest.mark.parametrize("fields", [{}, {"stop": "fox says"}, {"max_output_tokens": 4}, {"top_logprobs": 2}])
async def test_any_ingress_has_the_document_and_the_events_however_tokens_came(
    replica: FakeReplica,
    make_app: MakeApp,
    http: Http,
    writes: Writes,
    store: MemoryJournalStore,
    batch: int,
    fields: Event,
) -> None:
    replica.scripts = [writes(batch=batch)]
    app, other = make_app(replica, kept=store), http(make_app(replica, kept=store))
    first = Exchange(app, "POST", "/v1/responses", {**HI, **fields, "stream": True})
    await first.end()
    events = events_of(first.body)
    final = events[-1]["response"]
    assert final["status"] == ("incomplete" if "max_output_tokens" in fields else "completed")
    requests = len(replica.requests)
    assert (await other.get(f"/v1/responses/{final['id']}")).json() == final
    for after in (0, len(events) // 2, len(events) - 2):
        rest = await other.get(f"/v1/responses/{final['id']}?stream=true&starting_after={after}")
        assert first.body.endswith(rest.content)
        assert events_of(rest.content) == events[after + 1 :]
    assert (await other.get(f"/v1/responses/{final['id']}?stream=true")).content == first.body
    for after in (len(events) - 1, len(events) + 7):
        none = await other.get(f"/v1/responses/{final['id']}?stream=true&starting_after={after}")
        assert (none.status_code, none.content) == (200, b"")
    assert len(replica.requests) == requests


async def test_logprobs_are_those_of_the_text(api: httpx.AsyncClient) -> None:
    document = await create(api, top_logprobs=2, include=["message.output_text.logprobs"])
    (part,) = document["output"][0]["content"]
    assert b"".join(bytes(each["bytes"]) for each in part["logprobs"]).decode().strip() == ANSWER
    assert all(len(each["top_logprobs"]) == 2 for each in part["logprobs"])


async def test_a_response_that_was_cut_says_so(api: httpx.AsyncClient) -> None:
    document = await create(api, max_output_tokens=4)
    assert (document["status"], document["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert document["output"][0]["status"] == "incomplete"


async def test_a_response_continues_another_at_any_ingress(
    replica: FakeReplica, make_app: MakeApp, http: Http, store: MemoryJournalStore, tokenizer: ChatTokenizer
) -> None:
    api, other = http(make_app(replica, kept=store)), http(make_app(replica, kept=store))
    first = await create(api, input="One", instructions="Only now.")
    second = await create(other, input="Two", previous_response_id=first["id"])
    third = await create(api, input="Three", previous_response_id=second["id"])
    prompt = tokenizer.decode(list(replica.requests[-1].prompt_token_ids))
    assert "Only now." not in prompt
    assert prompt.count(ANSWER) == 2
    assert prompt.index("One") < prompt.index("Two") < prompt.index("Three")
    by_hand = [{"role": "user", "content": "One"}, *first["output"], {"role": "user", "content": "Two"}]
    await create(api, input=[*by_hand, *second["output"], {"role": "user", "content": "Three"}])
    assert replica.requests[-1].prompt_token_ids == replica.requests[-2].prompt_token_ids
    await api.delete(f"/v1/responses/{first['id']}")
    assert (await create(api, input="Four", previous_response_id=third["id"]))["status"] == "completed"


async def test_a_response_that_is_gone_can_not_be_continued(api: httpx.AsyncClient) -> None:
    first = await create(api)
    deleted = await api.delete(f"/v1/responses/{first['id']}")
    assert deleted.json() == {"id": first["id"], "object": "response", "deleted": True}
    for path in ("", "?stream=true", "/input_items"):
        assert (await api.get(f"/v1/responses/{first['id']}{path}")).status_code == 404
    assert (await api.delete(f"/v1/responses/{first['id']}")).status_code == 404
    refused = await api.post("/v1/responses", json={**HI, "previous_response_id": first["id"]})
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "previous_response_not_found"


async def test_input_items_are_listed_in_pages(api: httpx.AsyncClient) -> None:
    first = await create(api, input=[{"role": "user", "content": f"{n}"} for n in range(3)])
    second = await create(api, input="Last", previous_response_id=first["id"])
    path = f"/v1/responses/{second['id']}/input_items"
    whole = (await api.get(f"{path}?order=asc")).json()
    texts = [item["content"][0]["text"] for item in whole["data"]]
    assert texts == ["0", "1", "2", ANSWER, "Last"]
    assert (whole["object"], whole["has_more"]) == ("list", False)
    assert len({item["id"] for item in whole["data"]}) == 5
    page = (await api.get(f"{path}?limit=2")).json()
    assert ([item["content"][0]["text"] for item in page["data"]], page["has_more"]) == (["Last", ANSWER], True)
    rest = (await api.get(f"{path}?after={page['last_id']}")).json()
    assert [item["content"][0]["text"] for item in rest["data"]] == ["2", "1", "0"]
    for wrong in ("limit=0", "limit=101", "limit=x", "order=up", "after=msg_0"):
        assert (await api.get(f"{path}?{wrong}")).status_code == 400


async def test_an_item_is_found_by_its_id(
    replica: FakeReplica, make_app: MakeApp, http: Http, store: MemoryJournalStore
) -> None:
    api = http(make_app(replica, kept=store))
    first = await create(api, input="One")
    reference = {"type": "item_reference", "id": first["output"][0]["id"]}
    await create(api, input=[{"role": "user", "content": "One"}, reference, {"role": "user", "content": "Two"}])
    await create(api, input="Two", previous_response_id=first["id"])
    assert replica.requests[-1].prompt_token_ids == replica.requests[-2].prompt_token_ids
    for unknown in ("msg_elsewhere", f"{reference['id']}9", "msg_" + "a" * 22 + "o0"):
        body = {"input": [{"type": "item_reference", "id": unknown}, {"role": "user", "content": "Hi"}]}
        refused = await api.post("/v1/responses", json=body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "input[0].id")


async def test_a_response_is_its_callers_alone(api: httpx.AsyncClient) -> None:
    mine = {"Authorization": "Bearer mine"}
    response = await api.post("/v1/responses", json=HI, headers=mine)
    path = f"/v1/responses/{response.json()['id']}"
    for others in ({}, {"Authorization": "Bearer yours"}):
        assert (await api.get(path, headers=others)).status_code == 404
        assert (await api.get(f"{path}?stream=true", headers=others)).status_code == 404
        assert (await api.get(f"{path}/input_items", headers=others)).status_code == 404
        assert (await api.post(f"{path}/cancel", headers=others)).status_code == 404
        assert (await api.delete(path, headers=others)).status_code == 404
        body = {**HI, "previous_response_id": response.json()["id"]}
        assert (await api.post("/v1/responses", json=body, headers=others)).status_code == 400
    assert (await api.get(path, headers=mine)).json() == response.json()


async def test_a_client_that_goes_stops_the_work_and_any_ingress_goes_on_with_it(
    replica: FakeReplica, make_app: MakeApp, http: Http, writes: Writes, store: MemoryJournalStore
) -> None:
    replica.scripts = [writes(pause_s=0.02)]
    app = make_app(replica, kept=store)
    first = Exchange(app, "POST", "/v1/responses", {**HI, "stream": True})
    await first.until(b'"sequence_number":6}')
    first.disconnect()
    await first.end()
    assert replica.cancelled == 1
    seen = events_of(first.body)
    response_id = seen[0]["response"]["id"]
    replica.scripts = [writes()]
    other = http(make_app(replica, kept=store))
    document = {"status": "in_progress"}
    async with asyncio.timeout(10):
        while document["status"] == "in_progress":  # until the owner has let go of it
            document = (await other.get(f"/v1/responses/{response_id}")).json()
    assert document["status"] == "incomplete"
    rest = await other.get(f"/v1/responses/{response_id}?stream=true&starting_after={len(seen) - 1}")
    events = seen + events_of(rest.content)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert text_of(events[-1]["response"]) == ANSWER
    assert (await other.get(f"/v1/responses/{response_id}")).json() == events[-1]["response"]


async def test_an_ingress_that_closes_in_the_middle_leaves_the_rest_to_another(
    replica: FakeReplica, make_app: MakeApp, http: Http, writes: Writes, store: MemoryJournalStore
) -> None:
    whole = http(make_app(replica, kept=store))
    expected = (await whole.post("/v1/responses", json={**HI, "stream": True})).content
    replica.scripts = [writes(pause_s=0.005), writes(pause_s=0.005), writes()]
    app = make_app(replica, kept=store)
    first = Exchange(app, "POST", "/v1/responses", {**HI, "stream": True})
    await first.until(b'"sequence_number":6}')
    response_id = events_of(first.body[: first.body.index(b"\n\n") + 2])[0]["response"]["id"]
    other = Exchange(make_app(replica, kept=store), "GET", f"/v1/responses/{response_id}?stream=true")
    await other.until(b"event: response.created")
    first.task.cancel()
    await other.end()
    mine = json.loads(json.dumps(events_of(expected)).replace(events_of(expected)[0]["response"]["id"][5:], "x"))
    theirs = json.loads(json.dumps(events_of(other.body)).replace(response_id[5:], "x"))
    for event in (*mine, *theirs):
        if "response" in event:
            event["response"]["created_at"] = 0
    assert mine == theirs


async def test_a_whole_response_whose_client_goes_is_dropped(
    replica: FakeReplica, make_app: MakeApp, store: MemoryJournalStore
) -> None:
    replica.scripts = [lambda request: [None]]
    exchange = Exchange(make_app(replica, kept=store), "POST", "/v1/responses", HI)
    await until(lambda: bool(replica.requests) and len(store.journals) == 1)
    exchange.disconnect()
    await exchange.end()
    assert replica.cancelled == 1
    await until(lambda: len(store.journals) == 0)


@pytest.mark.parametrize("code", [FailureCode.OVERLOADED, FailureCode.ENGINE_FAILED])
@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"background": True}, {"store": False}])
async def test_a_refusal_is_a_status_and_leaves_nothing(
    replica: FakeReplica, make_app: MakeApp, http: Http, store: MemoryJournalStore, code: FailureCode, fields: Event
) -> None:
    replica.scripts = [lambda request: [Failure(code, "No.")]]
    response = await http(make_app(replica, kept=store)).post("/v1/responses", json={**HI, **fields})
    assert response.status_code in (500, 503)
    assert response.json()["error"]["code"] == str(code)
    await until(lambda: len(store.journals) == 0)


async def test_trouble_in_the_middle_is_how_the_response_failed(
    replica: FakeReplica, make_app: MakeApp, http: Http, writes: Writes, store: MemoryJournalStore
) -> None:
    failure = Failure(FailureCode.ENGINE_FAILED, "It broke.")
    replica.scripts = [lambda request: [*list(writes(pause_s=0.001, end=None)(request))[:8], failure]]
    first = Exchange(make_app(replica, kept=store), "POST", "/v1/responses", {**HI, "stream": True})
    await first.end()
    last = events_of(first.body)[-1]
    assert last["type"] == "response.failed"
    document = last["response"]
    assert (document["status"], document["error"]) == ("failed", {"code": "server_error", "message": "It broke."})
    assert document["output"][0]["status"] == "incomplete"
    other = http(make_app(replica, kept=store))
    assert (await other.get(f"/v1/responses/{document['id']}")).json() == document
    assert (await other.get(f"/v1/responses/{document['id']}?stream=true")).content == first.body
    whole = await other.post("/v1/responses", json=HI)
    assert (whole.status_code, whole.json()["error"]["code"]) == (500, "engine_failed")


async def test_a_response_of_weights_that_were_replaced_is_not_read_as_if_by_others(
    replica: FakeReplica, make_app: MakeApp, http: Http, writes: Writes, store: MemoryJournalStore
) -> None:
    first = await create(http(make_app(replica, kept=store)))
    others = http(make_app(FakeReplica([writes()], state=card(fingerprint=Fingerprint("tiny@2"))), kept=store))
    for path in ("", "?stream=true"):
        gone = await others.get(f"/v1/responses/{first['id']}{path}")
        assert (gone.status_code, gone.json()["error"]["code"]) == (410, "wrong_weights")
        stranger = await others.get(f"/v1/responses/{first['id']}{path}", headers={"Authorization": "Bearer other"})
        assert stranger.status_code == 404
    assert (await others.post("/v1/responses", json={**HI, "previous_response_id": first["id"]})).status_code == 410
    assert (await others.get(f"/v1/responses/{first['id']}/input_items")).status_code == 200
    assert (await others.delete(f"/v1/responses/{first['id']}")).status_code == 200


async def test_a_stranger_sets_no_work_going(
    replica: FakeReplica, make_app: MakeApp, http: Http, writes: Writes, store: MemoryJournalStore
) -> None:
    replica.scripts = [writes(pause_s=0.02)]
    app = make_app(replica, kept=store)
    begun = await create(http(app), background=True)
    await app.state.responses.aclose()
    other = make_app(replica, kept=store)
    for path in ("", "?stream=true"):
        response = await http(other).get(f"/v1/responses/{begun['id']}{path}", headers={"Authorization": "Bearer x"})
        assert response.status_code == 404
    assert len(other.state.responses) == 0


@pytest.mark.parametrize("kept", [True, False])
async def test_an_error_of_one_reader_has_the_number_of_its_last_event(
    replica: FakeReplica,
    make_app: MakeApp,
    writes: Writes,
    store: MemoryJournalStore,
    caplog: pytest.LogCaptureFixture,
    kept: bool,
) -> None:
    replica.scripts = [writes(pause_s=0.02)]
    body = {**HI, "stream": True, "store": kept}
    first = Exchange(make_app(replica, kept=store, journals=store), "POST", "/v1/responses", body, RESUME)
    await first.until(b'"sequence_number":3}')
    (stream_id,) = store.journals._journals
    path = f"/v1/responses/resp_{stream_id}?stream=true" if kept else f"/v1/streams/{stream_id}"
    reader = Exchange(make_app(replica, kept=store, journals=store), "GET", path)
    await reader.until(b'"sequence_number":5}')
    await store.erase(stream_id)
    await reader.end()
    *_, before, error = [json.loads(line[6:]) for line in reader.body.split(b"\n") if line.startswith(b"data: ")]
    assert error["type"] == "error"
    assert error["sequence_number"] == before["sequence_number"], "to read on after it is to miss nothing"
    assert not [record for record in caplog.records if record.levelname == "ERROR"], "its caller has deleted it"
    first.disconnect()
    await first.end()


async def test_a_stream_that_is_not_kept_is_resumed_by_its_own_request(
    replica: FakeReplica, make_app: MakeApp, http: Http
) -> None:
    api = http(make_app(replica))
    body = {**HI, "store": False, "stream": True}
    whole = (await api.post("/v1/responses", json=body, headers=RESUME)).text
    last = next(line for line in whole.split("\n") if line.startswith("id: "))[4:]
    rest = await api.post("/v1/responses", json=body, headers={**RESUME, "Last-Event-ID": last})
    assert whole.endswith(rest.text.split("\n", 1)[1])
    assert len(replica.requests) == 1
    for fields in ({}, {"store": False}):
        refused = await api.post("/v1/responses", json={**body, **fields}, headers={"X-Stream-Resume": "yes"})
        assert refused.status_code == 400


async def test_a_full_store_refuses_and_says_what_to_do(replica: FakeReplica, make_app: MakeApp, http: Http) -> None:
    full = MemoryJournalStore(JournalLimits(max_bytes=10))
    api = http(make_app(replica, kept=full))
    for fields in ({}, {"stream": True}, {"background": True}):
        refused = await api.post("/v1/responses", json={**HI, **fields})
        assert refused.status_code == 503
        assert "store: false" in refused.json()["error"]["message"]
    assert (await create(api, store=False))["status"] == "completed"


async def test_the_default_of_store_is_the_configurations(
    replica: FakeReplica, make_app: MakeApp, http: Http, store: MemoryJournalStore
) -> None:
    api = http(make_app(replica, kept=store, keep_responses=False))
    assert (await create(api))["store"] is False
    assert (await create(api, store=True))["store"] is True
    assert len(store.journals) == 1


async def test_a_replica_that_dies_changes_nothing(
    replica: FakeReplica, make_app: MakeApp, http: Http, writes: Writes
) -> None:
    replica.scripts = [
        lambda request: [*list(writes(pause_s=0.001, end=None)(request))[:8], ReplicaLost("died")],
        writes(),
    ]
    document = await create(http(make_app(replica)))
    assert text_of(document) == ANSWER
    assert len(replica.requests) == 2
