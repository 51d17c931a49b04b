"""Resume over HTTP: one or two ingresses over one store, in front of scripted replicas."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from asgi_driver import Exchange
from fake_replica import FakeReplica, Script, card
from journal_stores import BrokenStore
from memory_metrics import MemoryMetrics
from msgspec.structs import replace
from simulated_time import simulated_time
from starlette.applications import Starlette

from serve_app.api import resume
from serve_app.core import (
    Failure,
    FailureCode,
    Fingerprint,
    GenerationRequest,
    TokenBatch,
    TokenLogprobs,
    decode_replies,
    encode_replies,
)
from serve_app.generation.replica import ReplicaLost
from serve_app.resume import event_log
from serve_app.resume.context import ResumeSettings
from serve_app.resume.journal_store import JournalLimits
from serve_app.resume.memory_store import MemoryJournals, MemoryJournalStore

MakeApp = Callable[..., Starlette]
Writes = Callable[..., Script]
Http = Callable[[Starlette], httpx.AsyncClient]

HI = {"messages": [{"role": "user", "content": "Hi"}], "seed": 7}
RESUME = {"X-Stream-Resume": "1"}
EVENT = re.compile(rb"id: ([\w-]{22}):(\d+):[0-9a-f]{8}\n(.*?)\n\n", re.DOTALL)


async def _until(condition: Callable[[], bool]) -> None:
    """Let the other tasks run until it holds; `TimeoutError` when it never does."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - any condition, of things that tell nobody
            await asyncio.sleep(0.001)


def numbered(body: bytes) -> list[tuple[int, bytes]]:
    """(the index of the next event, the event without its id) of every event; all have one id."""
    assert body.replace(b": ping\n", b"").count(b"\n\n") == len(EVENT.findall(body))
    assert len({stream_id for stream_id, _, _ in EVENT.findall(body)}) <= 1
    return [(int(index), event) for _, index, event in EVENT.findall(body)]


def stream_id_of(exchange: Exchange) -> str:
    headers = dict(exchange.sent[0]["headers"])
    return str(headers[b"x-stream-id"].decode())


async def fetch(app: Starlette, stream_id: str, position: int | None = None, **headers: str) -> Exchange:
    """What `GET /v1/streams/{id}` answers, to its end."""
    if position is not None:
        headers["Last-Event-ID"] = f"{stream_id}:{position}"
    exchange = Exchange(app, "GET", f"/v1/streams/{stream_id}", headers=headers)
    await exchange.end()
    return exchange


@pytest.fixture
def store() -> MemoryJournalStore:
    return MemoryJournalStore(JournalLimits(lease_s=60))


BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/stream", HI),
    ("/stream", {**HI, "stop": ["fox says", "xyz"]}),
    ("/v1/chat/completions", {**HI, "stream": True}),
    ("/v1/chat/completions", {**HI, "stream": True, "logprobs": True, "top_logprobs": 2, "n": 3}),
    ("/v1/chat/completions", {**HI, "stream": True, "stream_options": {"include_usage": True}, "n": 2, "stop": "fox"}),
    ("/v1/completions", {"prompt": ["Once", "Twice"], "stream": True, "logprobs": 1, "n": 2, "seed": 7}),
    ("/v1/messages", {**HI, "stream": True, "max_tokens": 100, "stop_sequences": [" and"]}),
]


@pytest.mark.parametrize(("path", "body"), BODIES)
@pytest.mark.parametrize("batch", [1, 3, 100])
async def test_events_are_the_same_from_every_position_however_tokens_came(
    replica: FakeReplica, make_app: MakeApp, writes: Writes, store: MemoryJournalStore, path: str, body: Any, batch: int
) -> None:
    replica.scripts = [writes(batch=batch)]
    app, other = make_app(replica, journals=store), make_app(replica, journals=store)
    first = Exchange(app, "POST", path, body, RESUME)
    await first.end()
    events = numbered(first.body)
    assert [index for index, _ in events] == list(range(1, len(events) + 1))
    stream_id = stream_id_of(first)
    requests = len(replica.requests)
    for position in (None, 0, 1, len(events) // 2, len(events) - 1):
        again = await fetch(other, stream_id, position)
        assert again.status == 200
        assert numbered(again.body) == events[position or 0 :]
    for position in (len(events), len(events) + 7):
        assert (await fetch(other, stream_id, position)).status == 204
    assert len(replica.requests) == requests


@pytest.mark.parametrize(("path", "body"), BODIES)
@pytest.mark.parametrize("failing", [False, True])
async def test_events_that_are_no_longer_kept_are_made_again_to_the_byte(
    replica: FakeReplica,
    make_app: MakeApp,
    writes: Writes,
    store: MemoryJournalStore,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    body: Any,
    failing: bool,
) -> None:
    monkeypatch.setattr(event_log, "NEWEST_BYTES", 400)
    if failing:
        failure = Failure(FailureCode.ENGINE_FAILED, "It broke.")
        replica.scripts = [lambda request: [*list(writes(pause_s=0.001, end=None)(request))[:16], failure]]
    settings = ResumeSettings(tick_s=0.01, max_stream_event_bytes=1000)
    app, other = make_app(replica, journals=store), make_app(replica, journals=store, resume=settings)
    first = Exchange(app, "POST", path, body, RESUME)
    await first.end()
    events = numbered(first.body)
    for position in (0, 1, len(events) // 2, len(events) - 1):
        again = await fetch(other, stream_id_of(first), position)
        assert numbered(again.body) == events[position:]
    assert len(replica.requests) == len({request.choice for request in replica.requests})


@pytest.mark.parametrize(("path", "body"), BODIES)
async def test_resumable_and_plain_streams_say_the_same(
    replica: FakeReplica, make_app: MakeApp, http: Http, path: str, body: dict[str, Any]
) -> None:
    api = http(make_app(replica))
    plain, resumable = [await api.post(path, json=body, headers=headers) for headers in ({}, RESUME)]

    def texts(response: httpx.Response) -> dict[int, str]:
        found: dict[int, str] = {}
        for line in response.text.splitlines():
            if line.startswith("data: {"):
                data = json.loads(line[6:])
                text = data.get("generated_text") or data.get("delta", {}).get("text", "")
                for choice in data.get("choices", [{"index": 0, "text": text}]):
                    text = choice.get("text") or choice.get("delta", {}).get("content") or ""
                    found[choice["index"]] = found.get(choice["index"], "") + text
        return found

    assert texts(plain) == texts(resumable)
    assert any(texts(plain).values())
    assert "id: " not in plain.text
    assert plain.headers.get("x-seed") in (None, resumable.headers["x-seed"])


async def test_the_owner_goes_on_for_a_client_that_went(
    replica: FakeReplica, make_app: MakeApp, writes: Writes, store: MemoryJournalStore
) -> None:
    replica.scripts = [writes(pause_s=0.005)]
    app = make_app(replica, journals=store)
    first = Exchange(app, "POST", "/stream", HI, RESUME)
    await first.until(b":3:")
    first.disconnect()
    await first.end()
    seen = numbered(first.body)
    rest = await fetch(app, stream_id_of(first), seen[-1][0])
    events = seen + numbered(rest.body)
    assert [index for index, _ in events] == list(range(1, len(events) + 1))
    assert events[-1][1].startswith(b"event: done")
    assert len(replica.requests) == 1


async def test_a_stream_that_was_left_too_long_stops_and_is_continued(
    replica: FakeReplica, make_app: MakeApp, writes: Writes, store: MemoryJournalStore
) -> None:
    expected = Exchange(make_app(replica), "POST", "/stream", HI, RESUME)
    await expected.end()
    replica.scripts = [writes(pause_s=0.02)]
    app = make_app(replica, journals=store, resume=ResumeSettings(grace_s=0.03, lease_s=0.2, tick_s=0.01))
    first = Exchange(app, "POST", "/stream", HI, RESUME)
    await first.until(b":3:")
    first.disconnect()
    await first.end()
    await _until(lambda: replica.cancelled >= 2)
    seen = numbered(first.body)
    rest = await fetch(app, stream_id_of(first), seen[-1][0])
    assert seen + numbered(rest.body) == numbered(expected.body)
    assert len(replica.requests) == 3
    assert len(replica.requests[-1].output_token_ids) >= len(seen)


async def test_a_stream_that_is_continued_keeps_its_cache_salt(
    replica: FakeReplica, make_app: MakeApp, writes: Writes, store: MemoryJournalStore
) -> None:
    replica.scripts = [writes(pause_s=0.02)]
    app = make_app(replica, journals=store, resume=ResumeSettings(grace_s=0.0, lease_s=0.2, tick_s=0.01))
    first = Exchange(app, "POST", "/stream", {**HI, "cache_salt": "s"}, RESUME)
    await first.until(b":3:")
    first.disconnect()
    await first.end()
    await _until(lambda: replica.cancelled == 1)
    await fetch(make_app(replica, journals=store), stream_id_of(first), 3)
    assert [request.cache_salt for request in replica.requests] == ["s", "s"]


async def test_the_prompt_and_its_cache_hits_count_once_however_often_a_stream_is_resumed(
    replica: FakeReplica, make_app: MakeApp, writes: Writes, store: MemoryJournalStore, metrics: MemoryMetrics
) -> None:
    replica.scripts = [writes(pause_s=0.005), writes(pause_s=0.005, cached=64)]
    app = make_app(replica, journals=store, resume=ResumeSettings(grace_s=0.0, lease_s=0.2, tick_s=0.01))
    first = Exchange(app, "POST", "/stream", HI, RESUME)
    await first.until(b":3:")
    first.disconnect()
    await first.end()
    await _until(lambda: replica.cancelled == 1)
    rest = await fetch(make_app(replica, journals=store), stream_id_of(first), 3)
    usage = json.loads(rest.body.rpartition(b"data: ")[2])["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2}
    assert len(replica.requests) == 2
    assert metrics.counters["serve_app_prompt_tokens", ()] == usage["prompt_tokens"]
    assert metrics.counters["serve_app_prefix_cache_hits", ()] == 2


async def test_without_resume_a_disconnect_stops_the_work_at_once(
    replica: FakeReplica, make_app: MakeApp, writes: Writes
) -> None:
    replica.scripts = [writes(pause_s=0.02)]
    exchange = Exchange(make_app(replica), "POST", "/stream", HI)
    await exchange.until(b"data: ")
    exchange.disconnect()
    await exchange.end()
    assert replica.cancelled == 1


async def test_a_client_that_goes_before_it_knows_the_id_stops_the_work_at_once(
    replica: FakeReplica, make_app: MakeApp, store: MemoryJournalStore
) -> None:
    replica.scripts = [lambda request: [None]]
    exchange = Exchange(make_app(replica, journals=store), "POST", "/stream", HI, RESUME)
    await _until(lambda: bool(replica.requests) and len(store.journals) == 1)
    exchange.disconnect()
    await exchange.end()
    await _until(lambda: len(store.journals) == 0 and replica.cancelled == 1)
    assert replica.cancelled == 1


@pytest.mark.parametrize("code", [FailureCode.OVERLOADED, FailureCode.ENGINE_FAILED, FailureCode.INVALID_REQUEST])
async def test_a_refusal_is_a_real_status_and_leaves_no_journal(
    replica: FakeReplica, make_app: MakeApp, http: Http, store: MemoryJournalStore, code: FailureCode
) -> None:
    replica.scripts = [lambda request: [Failure(code, "No.")]]
    response = await http(make_app(replica, journals=store)).post("/stream", json=HI, headers=RESUME)
    assert response.status_code >= 400
    assert response.json()["error"]["code"] == str(code)
    await _until(lambda: len(store.journals) == 0)


async def test_trouble_in_the_middle_is_the_last_event_for_everybody(
    replica: FakeReplica, make_app: MakeApp, writes: Writes, store: MemoryJournalStore
) -> None:
    failure = Failure(FailureCode.ENGINE_FAILED, "It broke.")
    replica.scripts = [lambda request: [*list(writes(pause_s=0.001, end=None)(request))[:8], failure]]
    first = Exchange(make_app(replica, journals=store), "POST", "/stream", HI, RESUME)
    await first.end()
    events = numbered(first.body)
    assert events[-1][1].startswith(b"event: error")
    assert b"It broke." in events[-1][1]
    again = await fetch(make_app(replica, journals=store), stream_id_of(first))
    assert numbered(again.body) == events
    assert (await fetch(make_app(replica, journals=store), stream_id_of(first), len(events))).status == 204


@pytest.mark.parametrize("headers", [{}, RESUME], ids=["plain", "resumable"])
@pytest.mark.parametrize("path", ["/stream", "/v1/chat/completions"])
async def test_a_stream_whose_weights_are_gone_says_so_and_is_never_continued_by_others(
    replica: FakeReplica,
    make_app: MakeApp,
    writes: Writes,
    store: MemoryJournalStore,
    path: str,
    headers: dict[str, str],
) -> None:
    gone = Failure(FailureCode.WRONG_WEIGHTS, "the model was replaced; repeat the request")
    replica.scripts = [
        lambda request: [*list(writes(pause_s=0.001, end=None)(request))[:8], ReplicaLost("died")],
        lambda request: [gone],
    ]
    body = {**HI, "stream": True} if path != "/stream" else HI
    first = Exchange(make_app(replica, journals=store), "POST", path, body, headers)
    await first.end()
    assert (first.status, first.complete) == (200, True)
    last = first.body.strip().split(b"\n\n")[-1]
    error = json.loads(last.partition(b"data: ")[2])["error"]
    assert (error["code"], error["message"]) == ("wrong_weights", gone.message)
    assert len({len(request.output_token_ids) for request in replica.requests[1:]}) == 1, "all of them continuations"
    if not headers:
        return
    again = await fetch(make_app(replica, journals=store), stream_id_of(first))
    assert numbered(again.body) == numbered(first.body)
    others = FakeReplica([writes()], state=card(fingerprint=Fingerprint("tiny@2")))
    refused = await fetch(make_app(others, journals=store), stream_id_of(first), 3)
    assert refused.status == 410
    assert json.loads(refused.body)["error"]["code"] == "wrong_weights"
    assert not others.requests


async def test_the_weights_are_those_that_are_served_now(
    make_app: Callable[..., Starlette], writes: Callable[..., Script], store: MemoryJournalStore
) -> None:
    """Not those that this process saw when it was first asked: the model may have been replaced behind it."""
    elsewhere = make_app(FakeReplica([writes()] * 2), journals=store)
    streams = [Exchange(elsewhere, "POST", "/stream", HI, RESUME) for _ in range(2)]
    for stream in streams:
        await stream.end()
    replica = FakeReplica([writes()])
    app = make_app(replica, journals=store)
    assert (await fetch(app, stream_id_of(streams[0]))).status == 200
    replica.state = card(fingerprint=Fingerprint("tiny@2"))
    refused = await fetch(app, stream_id_of(streams[1]), 3)
    assert refused.status == 410


EVENT_ID = re.compile(rb"id: ([\w:-]+)\n")
COMPLETION = {"prompt": "Once", "stream": True, "logprobs": 1, "seed": 7}


async def left_behind(app: Starlette, store: MemoryJournalStore, body: dict[str, Any], path: str) -> list[str]:
    """The ids of a whole answer's events, of which the journal has only the first two tokens: the ingress died then."""
    exchange = Exchange(app, "POST", path, body, RESUME)
    await exchange.end()
    stream_id = stream_id_of(exchange)
    await _until(lambda: store.journals._journals[stream_id].finished)
    journal = store.journals._journals[stream_id]
    replies = [reply for record in journal.records for _, reply in decode_replies(record)]
    tokens = [token for reply in replies if isinstance(reply, TokenBatch) for token in reply.token_ids]
    logprobs = [entry for reply in replies if isinstance(reply, TokenBatch) for entry in reply.logprobs or ()]
    beginning = TokenBatch(0, tuple(tokens[:2]), tuple(logprobs[:2]) if logprobs else None)
    journal.records, journal.finished = [encode_replies([(0, beginning)])], False
    return [event_id.decode() for event_id in EVENT_ID.findall(exchange.body)]


async def resumed(app: Starlette, event_id: str) -> Exchange:
    exchange = Exchange(app, "GET", f"/v1/streams/{event_id[:22]}", headers={"Last-Event-ID": event_id})
    await exchange.end()
    return exchange


@pytest.mark.parametrize(("path", "body"), [("/stream", HI), ("/v1/completions", COMPLETION)])
async def test_an_answer_is_never_joined_from_two_texts(
    replica: FakeReplica, make_app: MakeApp, writes: Writes, store: MemoryJournalStore, path: str, body: dict[str, Any]
) -> None:
    replica.scripts = [writes(), writes("The end, otherwise.")]
    ids = await left_behind(make_app(replica, journals=store), store, body, path)
    other = make_app(replica, journals=store)
    for event_id in (ids[5], ids[-1]):  # computed again first, then known
        refused = await resumed(other, event_id)
        assert refused.status == 410
        assert json.loads(refused.body)["error"]["code"] == "stream_changed"
    assert (await resumed(other, ids[1])).status == 200, "of that the journal has all"
    assert (await resumed(other, ids[5].rpartition(":")[0])).status == 200, "an id of an earlier version says nothing"


async def test_a_text_that_turns_out_another_late_ends_with_an_error(
    replica: FakeReplica, make_app: MakeApp, writes: Writes, store: MemoryJournalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "_CHECK_WAIT_S", 0.001)
    replica.scripts = [writes(), writes("The end, otherwise.", pause_s=0.02)]
    ids = await left_behind(make_app(replica, journals=store), store, HI, "/stream")
    late = await resumed(make_app(replica, journals=store), ids[5])
    assert late.status == 200
    assert late.body.startswith(b"retry: 1000\nevent: error\n")
    assert b"stream_changed" in late.body


async def test_the_same_tokens_with_other_logprobs_are_one_text(
    replica: FakeReplica, make_app: MakeApp, writes: Writes, store: MemoryJournalStore
) -> None:
    def otherwise(request: GenerationRequest) -> list[Any]:
        steps = list(writes()(request))
        return [replace(step, logprobs=tuple(TokenLogprobs(-0.26, e.top) for e in step.logprobs)) for step in steps]

    replica.scripts = [writes(), otherwise]
    ids = await left_behind(make_app(replica, journals=store), store, COMPLETION, "/v1/completions")
    rest = await resumed(make_app(replica, journals=store), ids[5])
    assert rest.status == 200
    assert [index for index, _ in numbered(rest.body)] == list(range(7, len(ids) + 1))


async def test_eventsource_repeats_its_url(replica: FakeReplica, make_app: MakeApp, store: MemoryJournalStore) -> None:
    app, path = make_app(replica, journals=store), "/stream?prompt=Once&resume=1&seed=7"
    first = Exchange(app, "GET", path)
    await first.end()
    events = numbered(first.body)
    stream_id = stream_id_of(first)
    again = Exchange(app, "GET", path, headers={"Last-Event-ID": f"{stream_id}:2"})
    await again.end()
    assert numbered(again.body) == events[2:]
    last = Exchange(app, "GET", path, headers={"Last-Event-ID": f"{stream_id}:{len(events)}"})
    await last.end()
    assert (last.status, last.body) == (204, b"")
    assert len(replica.requests) == 1


async def test_a_repeated_post_continues_too(replica: FakeReplica, make_app: MakeApp) -> None:
    app = make_app(replica)
    first = Exchange(app, "POST", "/v1/chat/completions", {**HI, "stream": True}, RESUME)
    await first.end()
    headers = {**RESUME, "Last-Event-ID": f"{stream_id_of(first)}:3"}
    again = Exchange(app, "POST", "/v1/chat/completions", {**HI, "stream": True}, headers)
    await again.end()
    assert numbered(again.body) == numbered(first.body)[3:]


async def test_whole_answers_are_as_ever(replica: FakeReplica, make_app: MakeApp, http: Http) -> None:
    response = await http(make_app(replica)).post("/v1/chat/completions", json=HI, headers=RESUME)
    assert response.json()["object"] == "chat.completion"
    assert "x-stream-id" not in response.headers


UNKNOWN = "A" * 22


@pytest.mark.parametrize(
    ("path", "headers", "status", "code"),
    [
        ("/v1/streams/short", {}, 400, "invalid_stream_id"),
        (f"/v1/streams/{'A' * 23}", {}, 400, "invalid_stream_id"),
        ("/v1/streams/..%2f..%2fetc", {}, 400, "invalid_stream_id"),
        ("/v1/streams/", {}, 404, "not_found"),
        (f"/v1/streams/{UNKNOWN}", {"Last-Event-ID": "nonsense"}, 400, "invalid_event_id"),
        (f"/v1/streams/{UNKNOWN}", {"Last-Event-ID": f"{UNKNOWN}:-1"}, 400, "invalid_event_id"),
        (f"/v1/streams/{UNKNOWN}", {"Last-Event-ID": f"{UNKNOWN}:{'9' * 30}"}, 400, "invalid_event_id"),
        (f"/v1/streams/{UNKNOWN}", {"Last-Event-ID": f"{UNKNOWN}:\u0663"}, 400, "invalid_event_id"),
        (f"/v1/streams/{UNKNOWN}", {"Last-Event-ID": f"{'B' * 22}:1"}, 400, "invalid_event_id"),
        (f"/v1/streams/{UNKNOWN}", {}, 410, "stream_gone"),
        (f"/v1/streams/{UNKNOWN}", {"Last-Event-ID": f"{UNKNOWN}:1"}, 410, "stream_gone"),
        ("/stream?prompt=Hi&resume=1", {"Last-Event-ID": f"{UNKNOWN}:1"}, 410, "stream_gone"),
        ("/stream?prompt=Hi&resume=1", {"Last-Event-ID": "x"}, 400, "invalid_event_id"),
        ("/stream?prompt=Hi&resume=yes", {}, 400, "invalid_value"),
        ("/stream?prompt=Hi", {"X-Stream-Resume": "true"}, 400, "invalid_value"),
        ("/stream?prompt=&resume=1", {}, 400, None),
    ],
)
async def test_rubbish_is_refused(
    replica: FakeReplica, make_app: MakeApp, path: str, headers: dict[str, str], status: int, code: str | None
) -> None:
    exchange = Exchange(make_app(replica), "GET", path, headers=headers)
    await exchange.end()
    assert exchange.status == status
    if code is not None:
        assert json.loads(exchange.body)["error"]["code"] == code
    assert not replica.requests


async def test_a_last_event_id_without_resume_means_nothing(replica: FakeReplica, make_app: MakeApp) -> None:
    exchange = Exchange(make_app(replica), "GET", "/stream?prompt=Hi", headers={"Last-Event-ID": "7"})
    await exchange.end()
    assert exchange.status == 200
    assert b"id: " not in exchange.body


async def test_a_reader_is_told_when_another_replica_went_on(
    replica: FakeReplica, make_app: MakeApp, writes: Writes, store: MemoryJournalStore
) -> None:
    whole = writes()
    replica.scripts = [lambda request: [*whole(request)[:4], ReplicaLost("it died")], whole]
    app = make_app(replica, journals=store)
    exchange = Exchange(app, "POST", "/v1/chat/completions", {**HI, "stream": True}, RESUME)
    await exchange.end()
    assert len(re.findall(rb"^: continued on another replica after \d\.\d s\n", exchange.body, re.MULTILINE)) == 1
    later = await fetch(app, stream_id_of(exchange), 0)
    assert b": continued" not in later.body, "it was not there"
    assert EVENT.findall(later.body) == EVENT.findall(exchange.body)


async def test_a_stream_can_be_ended_by_who_opened_it(
    replica: FakeReplica, make_app: MakeApp, writes: Writes, store: MemoryJournalStore, http: Http
) -> None:
    replica.scripts = [writes(" ".join(["word"] * 500), pause_s=0.01)]
    app, other = make_app(replica, journals=store), make_app(replica, journals=store)
    for number, ingress in enumerate((app, other), 1):
        mine = {**RESUME, "authorization": "Bearer mine"}
        exchange = Exchange(app, "POST", "/v1/chat/completions", {**HI, "stream": True}, mine)
        await exchange.until(b'"content"')
        path = f"/v1/streams/{stream_id_of(exchange)}"
        assert (await http(ingress).delete(path)).status_code == 404
        assert (await http(ingress).delete(path, headers={"authorization": "Bearer mine"})).status_code == 204
        await exchange.end()
        assert b'"code": "cancelled"' in exchange.body
        assert replica.closed == number
    assert (await http(app).delete("/v1/streams/nonsense")).status_code == 400
    assert (await http(app).delete(f"/v1/streams/{'A' * 22}")).status_code == 410


@pytest.mark.parametrize("elsewhere", [True, False])
async def test_a_stream_belongs_to_who_opened_it(
    replica: FakeReplica, make_app: MakeApp, store: MemoryJournalStore, elsewhere: bool
) -> None:
    app = make_app(replica, journals=store)
    first = Exchange(app, "POST", "/stream", HI, {**RESUME, "Authorization": "Bearer mine"})
    await first.end()
    stream_id = stream_id_of(first)
    app = make_app(replica, journals=store) if elsewhere else app
    for foreign in ({}, {"Authorization": "Bearer yours"}, {"Authorization": "mine"}):
        refused = await fetch(app, stream_id, 1, **foreign)
        assert refused.status == 404
        assert json.loads(refused.body)["error"]["code"] == "stream_not_found"
    assert (await fetch(app, stream_id, 1, Authorization="bearer mine")).status == 200
    key = {"x-api-key": "mine"}
    assert (await fetch(app, stream_id, 1, **key)).status == 200
    assert (await fetch(app, stream_id, 1, **{"x-api-key": "yours"})).status == 404
    assert (await fetch(app, stream_id, 1, Authorization="Bearer yours", **key)).status == 404
    assert b"mine" not in b"".join(journal.document for journal in store.journals._journals.values())


async def test_an_expired_stream_is_gone(replica: FakeReplica, make_app: MakeApp) -> None:
    now_s = 0.0
    limits = JournalLimits(expiry_s=60)
    store = MemoryJournalStore(limits)
    store.journals = MemoryJournals(limits, lambda: now_s)
    app = make_app(replica, journals=store)
    first = Exchange(app, "POST", "/stream", HI, RESUME)
    await first.end()
    await _until(lambda: not any(task.get_name().startswith("stream ") for task in asyncio.all_tasks()))
    now_s = 61
    gone = await fetch(app, stream_id_of(first), 1)
    assert gone.status == 410
    assert "again" in json.loads(gone.body)["error"]["message"]


async def test_full_journals_refuse_at_once(
    replica: FakeReplica, make_app: MakeApp, http: Http, writes: Writes
) -> None:
    store = MemoryJournalStore(JournalLimits(max_journals=1, lease_s=60))
    replica.scripts = [writes(pause_s=0.02)]
    app = make_app(replica, journals=store)
    first = Exchange(app, "POST", "/stream", HI, RESUME)
    await first.until(b":1:")
    refused = await http(app).post("/stream", json=HI, headers=RESUME)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
    assert "retry-after" in refused.headers
    assert replica.cancelled == 1
    await first.end()
    assert first.complete


async def test_a_store_that_is_down_refuses_new_streams_and_keeps_running_ones(
    replica: FakeReplica, make_app: MakeApp, http: Http, writes: Writes
) -> None:
    store = BrokenStore(JournalLimits(lease_s=0.2))
    replica.scripts = [writes(pause_s=0.003)]
    app = make_app(replica, journals=store)
    first = Exchange(app, "POST", "/stream", HI, RESUME)
    await first.until(b":2:")
    store.down = True
    refused = await http(app).post("/stream", json=HI, headers=RESUME)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "journal_unavailable")
    assert "retry-after" in refused.headers
    assert (await fetch(make_app(replica, journals=store), stream_id_of(first))).status == 503
    await first.end()
    assert numbered(first.body)[-1][1].startswith(b"event: done")
    store.down = False
    again = await fetch(app, stream_id_of(first))
    assert numbered(again.body) == numbered(first.body)


async def test_a_lost_journal_is_written_again_by_its_owner(
    replica: FakeReplica, make_app: MakeApp, writes: Writes
) -> None:
    store = BrokenStore(JournalLimits(lease_s=60))
    replica.scripts = [writes(pause_s=0.003)]
    first = Exchange(make_app(replica, journals=store), "POST", "/stream", HI, RESUME)
    await first.until(b":5:")
    store.forget_all()
    await first.end()
    again = await fetch(make_app(replica, journals=store), stream_id_of(first), 1)
    assert numbered(again.body) == numbered(first.body)[1:]
    assert len(replica.requests) == 1


async def test_a_slow_reader_is_told_and_may_resume(
    replica: FakeReplica, make_app: MakeApp, writes: Writes, store: MemoryJournalStore
) -> None:
    text = "word " * 150
    body = {"prompt": "Hi", "max_tokens": 200}
    replica.scripts = [writes(text, pause_s=0.0)]
    app = make_app(replica, journals=store, slow_reader_bytes=2000)
    slow = Exchange(app, "POST", "/stream", body, RESUME)
    await slow.until(b":1:")
    slow.reading.clear()
    async with asyncio.timeout(60):
        while b"slow_reader" not in slow.body:
            await asyncio.sleep(0.005)
            if len(replica.requests) and replica.closed:
                slow.reading.set()
    await slow.end()
    *seen, last = slow.body.strip().split(b"\n\n")
    assert last.startswith(b"event: error\n")  # without an id: the client goes on after the last that has one
    position = numbered(b"\n\n".join([*seen, b""]))[-1][0]
    rest = await fetch(app, stream_id_of(slow), position)
    assert numbered(rest.body)[0][0] == position + 1
    assert numbered(rest.body)[-1][1].startswith(b"event: done")
    assert len(replica.requests) == 1


async def test_a_long_answer_from_the_start_is_no_slow_reader(
    replica: FakeReplica, make_app: MakeApp, writes: Writes, store: MemoryJournalStore
) -> None:
    replica.scripts = [writes("word " * 150)]
    first = Exchange(make_app(replica, journals=store), "POST", "/stream", {"prompt": "Hi"}, RESUME)
    await first.end()
    app = make_app(replica, journals=store, slow_reader_bytes=len(first.body) // 2)
    again = await fetch(app, stream_id_of(first))
    assert numbered(again.body) == numbered(first.body)


async def test_what_comes_all_at_once_makes_no_slow_reader(
    replica: FakeReplica, make_app: MakeApp, writes: Writes, store: MemoryJournalStore
) -> None:
    """As when another ingress has written much of the journal since this one looked."""
    all_at_once = writes("word " * 150, batch=1_000, pause_s=0.05)
    replica.scripts = [lambda request: [TokenBatch(0), *all_at_once(request)]]
    exchange = Exchange(
        make_app(replica, journals=store, slow_reader_bytes=2_000), "POST", "/stream", {"prompt": "Hi"}, RESUME
    )
    await exchange.end()
    assert len(exchange.body) > 10_000
    assert numbered(exchange.body)[-1][1].startswith(b"event: done")


async def test_unattended_streams_are_bounded(
    replica: FakeReplica, make_app: MakeApp, writes: Writes, store: MemoryJournalStore
) -> None:
    replica.scripts = [writes(pause_s=0.05)]
    settings = ResumeSettings(max_unattended=2, lease_s=0.2, tick_s=0.01)
    app = make_app(replica, journals=store, resume=settings)
    left = []
    for _ in range(4):
        exchange = Exchange(app, "POST", "/stream", HI, RESUME)
        await exchange.until(b":1:")
        exchange.disconnect()
        await exchange.end()
        left.append(exchange)
    await _until(lambda: replica.cancelled >= 2)
    assert replica.cancelled == 2
    rest = await fetch(app, stream_id_of(left[0]), 1)
    assert numbered(rest.body)[-1][1].startswith(b"event: done")


async def test_heartbeats_have_no_id_and_one_newline(replica: FakeReplica, make_app: MakeApp, writes: Writes) -> None:
    replica.scripts = [writes("Hi there", pause_s=0.03)]
    with simulated_time():
        exchange = Exchange(make_app(replica, stream={"heartbeat_s": 0.01}), "POST", "/stream", HI, RESUME)
        await exchange.end()
    assert exchange.body.count(b": ping\n") > 2
    assert b": ping\n\n" not in exchange.body
    numbered(exchange.body)
