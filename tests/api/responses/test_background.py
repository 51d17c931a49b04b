"""Responses in the background: they go on without a reader, at another ingress if theirs dies, and can be cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest
from asgi_driver import Exchange
from fake_replica import FakeReplica, Script
from memory_metrics import MemoryMetrics
from responses_api import BRIEF, HI, create, events_of, text_of, until
from starlette.applications import Starlette

from serve_app.core import Failure, FailureCode
from serve_app.generation.attempts import Generations
from serve_app.resume.context import ResumeSettings
from serve_app.resume.journal_store import JournalLimits
from serve_app.resume.memory_store import MemoryJournalStore

MakeApp = Callable[..., Starlette]
Http = Callable[[Starlette], httpx.AsyncClient]
Writes = Callable[..., Script]
Event = dict[str, Any]
ANSWER = "The quick brown fox says 🙂 and naïve."


@pytest.fixture
def store() -> MemoryJournalStore:
    return MemoryJournalStore(JournalLimits(lease_s=0.3))


async def polled(api: httpx.AsyncClient, response_id: str) -> Event:
    """The response once it has ended."""
    async with asyncio.timeout(10):
        while True:
            document: Event = (await api.get(f"/v1/responses/{response_id}")).json()
            if document["status"] not in ("queued", "in_progress"):
                return document
            await asyncio.sleep(0.01)


async def test_it_goes_on_without_a_reader_and_any_ingress_tells(
    replica: FakeReplica,
    make_app: MakeApp,
    http: Http,
    writes: Writes,
    store: MemoryJournalStore,
    metrics: MemoryMetrics,
) -> None:
    replica.scripts = [writes(pause_s=0.005)]
    api = http(make_app(replica, kept=store, background=BRIEF))
    other = http(make_app(replica, kept=store, background=BRIEF))
    begun = await create(api, background=True)
    assert begun["status"] in ("queued", "in_progress")
    assert (begun["background"], begun["usage"]) == (True, None)
    document = await polled(other, begun["id"])
    assert text_of(document) == ANSWER
    assert document == (await api.get(f"/v1/responses/{begun['id']}")).json()
    assert len(replica.requests) == 1
    events = events_of((await api.get(f"/v1/responses/{begun['id']}?stream=true")).content)
    assert [event["type"] for event in events][:3] == ["response.created", "response.queued", "response.in_progress"]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    counted = [metrics.counters[f"serve_app_{name}_tokens", ()] for name in ("prompt", "generation")]
    assert counted == [document["usage"]["input_tokens"], document["usage"]["output_tokens"]]


async def test_its_stream_goes_on_when_its_reader_goes(
    replica: FakeReplica, make_app: MakeApp, http: Http, writes: Writes, store: MemoryJournalStore
) -> None:
    replica.scripts = [writes(pause_s=0.005)]
    app = make_app(replica, kept=store, background=BRIEF)
    first = Exchange(app, "POST", "/v1/responses", {**HI, "background": True, "stream": True})
    await first.until(b'"sequence_number":6}')
    first.disconnect()
    await first.end()
    seen = events_of(first.body)
    response_id = seen[0]["response"]["id"]
    rest = await http(app).get(f"/v1/responses/{response_id}?stream=true&starting_after={len(seen) - 1}")
    events = seen + events_of(rest.content)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert text_of(events[-1]["response"]) == ANSWER
    assert len(replica.requests) == 1


@pytest.mark.parametrize("dies", ["released", "silent"])
async def test_another_ingress_takes_it_over_when_its_own_dies(
    replica: FakeReplica, make_app: MakeApp, http: Http, writes: Writes, store: MemoryJournalStore, dies: str
) -> None:
    replica.scripts = [writes(pause_s=0.02), writes()]
    app = make_app(replica, kept=store, background=BRIEF)
    begun = await create(http(app), background=True)
    (owner,) = app.state.responses._streams.values()
    await until(lambda: owner.feed.transcript.tokens > 3)
    if dies == "released":
        await app.state.responses.aclose()
    else:
        owner._context.writer._owned.clear()  # nothing is written any more, and its lease lapses
        owner._task.cancel()
    document = await polled(http(make_app(replica, kept=store, background=BRIEF)), begun["id"])
    assert text_of(document) == ANSWER
    assert len(replica.requests[-1].output_token_ids) > 0


@pytest.mark.parametrize("where", ["here", "elsewhere"])
@pytest.mark.parametrize("phase", ["queued", "running"])
async def test_any_ingress_cancels_it(
    replica: FakeReplica,
    make_app: MakeApp,
    http: Http,
    writes: Writes,
    where: str,
    phase: str,
) -> None:
    store = MemoryJournalStore(JournalLimits(lease_s=60))
    replica.scripts = [writes(end=None) if phase == "running" else lambda request: [None]]
    app = make_app(replica, kept=store, background=BRIEF)
    begun = await create(http(app), background=True)
    reader = Exchange(app, "GET", f"/v1/responses/{begun['id']}?stream=true")
    await reader.until(b'"sequence_number":5}' if phase == "running" else b"response.queued")
    api = http(app) if where == "here" else http(make_app(replica, kept=store, background=BRIEF))
    cancelled = (await api.post(f"/v1/responses/{begun['id']}/cancel")).json()
    assert (cancelled["status"], cancelled["error"]) == ("cancelled", None)
    assert bool(cancelled["output"]) == (phase == "running")
    await until(lambda: replica.cancelled == 1)
    await reader.end()
    last = events_of(reader.body)[-1]
    assert (last["type"], last["response"]) == ("response.incomplete", cancelled)
    assert (await api.post(f"/v1/responses/{begun['id']}/cancel")).json() == cancelled
    other = http(make_app(replica, kept=store, background=BRIEF))
    assert (await other.get(f"/v1/responses/{begun['id']}?stream=true")).content == reader.body
    assert len(replica.requests) == 1


async def test_one_whose_ingress_died_is_cancelled_without_it(
    replica: FakeReplica, make_app: MakeApp, http: Http, writes: Writes, store: MemoryJournalStore
) -> None:
    replica.scripts = [writes(pause_s=0.02)]
    app = make_app(replica, kept=store, background=BRIEF)
    begun = await create(http(app), background=True)
    await app.state.responses.aclose()
    api = http(make_app(replica, kept=store, background=BRIEF))
    assert (await api.post(f"/v1/responses/{begun['id']}/cancel")).json()["status"] == "cancelled"
    assert (await api.get(f"/v1/responses/{begun['id']}")).json()["status"] == "cancelled"
    assert len(replica.requests) == 1


async def test_only_background_responses_are_cancelled_and_ended_ones_stay(api: httpx.AsyncClient) -> None:
    whole = await create(api)
    refused = await api.post(f"/v1/responses/{whole['id']}/cancel")
    assert refused.status_code == 400
    begun = await create(api, background=True)
    document = await polled(api, begun["id"])
    assert (await api.post(f"/v1/responses/{begun['id']}/cancel")).json() == document
    assert (await api.post("/v1/responses/resp_nothing/cancel")).status_code == 404


async def test_one_that_is_deleted_while_it_runs_stops_and_stays_away(
    replica: FakeReplica, make_app: MakeApp, http: Http, writes: Writes, store: MemoryJournalStore
) -> None:
    replica.scripts = [writes(pause_s=0.02)]
    app = make_app(replica, kept=store, background=BRIEF)
    begun = await create(http(app), background=True)
    reader = Exchange(app, "GET", f"/v1/responses/{begun['id']}?stream=true")
    await reader.until(b'"sequence_number":5}')
    other = http(make_app(replica, kept=store, background=BRIEF))
    assert (await other.delete(f"/v1/responses/{begun['id']}")).status_code == 200
    await until(lambda: replica.cancelled == 1)
    await reader.end()
    before, error = events_of(reader.body)[-2:]
    assert error["type"] == "error"
    assert error["sequence_number"] == before["sequence_number"], "to read on after it is to miss nothing"
    assert (await http(app).get(f"/v1/responses/{begun['id']}")).status_code == 404
    assert await store.size() == (1, 0), "an empty journal tells its owner that it lost it"


@pytest.mark.parametrize("then", ["a cancel", "a failure", "the end of its ingress"])
async def test_what_comes_after_its_last_token_changes_nothing(
    replica: FakeReplica,
    make_app: MakeApp,
    http: Http,
    writes: Writes,
    store: MemoryJournalStore,
    monkeypatch: pytest.MonkeyPatch,
    then: str,
) -> None:
    ending = asyncio.Event()

    async def stop(generations: Generations, choice: int) -> None:
        ending.set()
        if then == "a failure":
            raise ZeroDivisionError("a bug")
        await asyncio.Event().wait()

    monkeypatch.setattr(Generations, "stop", stop)
    replica.scripts = [writes(pause_s=0.001)]
    app, other = make_app(replica, kept=store, background=BRIEF), http(make_app(replica, kept=store, background=BRIEF))
    begun = await create(http(app), background=True, stop="says")
    reader = Exchange(app, "GET", f"/v1/responses/{begun['id']}?stream=true")
    await ending.wait()
    (owner,) = app.state.responses._streams.values()
    if then == "the end of its ingress":
        await until(lambda: not owner._owner.journal._unwritten)
        owner._context.writer._owned.clear()  # the last token is written, and nothing more
        owner._task.cancel()
    document = (await other.post(f"/v1/responses/{begun['id']}/cancel")).json()
    assert (document["status"], text_of(document)) == ("completed", "The quick brown fox ")
    await reader.end()
    assert [event["type"] for event in events_of(reader.body)][-2:] == [
        "response.output_item.done",
        "response.completed",
    ]
    assert (await other.get(f"/v1/responses/{begun['id']}?stream=true")).content == reader.body


async def test_an_owner_that_does_not_react_is_no_cancelled_response(
    replica: FakeReplica, make_app: MakeApp, http: Http
) -> None:
    store = MemoryJournalStore(JournalLimits(lease_s=60))
    replica.scripts = [lambda request: [None]]
    settings = replace(BRIEF, settle_s=0.02)
    app = make_app(replica, kept=store, background=settings)
    begun = await create(http(app), background=True)
    (owner,) = app.state.responses._streams.values()
    owner._context.writer._owned.clear()
    refused = await http(make_app(replica, kept=store, background=settings)).post(f"/v1/responses/{begun['id']}/cancel")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "journal_unavailable")
    assert "Try again" in refused.json()["error"]["message"]


async def test_one_whose_journal_was_dropped_is_generated_no_further(
    replica: FakeReplica, make_app: MakeApp, http: Http, store: MemoryJournalStore
) -> None:
    replica.scripts = [lambda request: [None]]
    api = http(make_app(replica, kept=store, background=BRIEF))
    begun = await create(api, background=True)
    store.journals.limits = JournalLimits(max_bytes=1)
    await until(lambda: replica.cancelled == 1)
    assert (await api.get(f"/v1/responses/{begun['id']}")).status_code == 404


async def test_an_ingress_without_a_place_reads_what_others_have(
    replica: FakeReplica, make_app: MakeApp, http: Http, writes: Writes, store: MemoryJournalStore
) -> None:
    replica.scripts = [writes(), writes(pause_s=0.02), writes()]
    app = make_app(replica, kept=store, background=BRIEF)
    ended, begun = await create(http(app), background=True), await create(http(app), background=True)
    assert text_of(await polled(http(app), ended["id"])) == ANSWER
    await app.state.responses.aclose()
    full = http(make_app(replica, kept=store, background=replace(BRIEF, max_background=0)))
    for path in ("", "?stream=true"):
        assert ANSWER in (await full.get(f"/v1/responses/{ended['id']}{path}")).text
    assert (await full.get(f"/v1/responses/{begun['id']}")).json()["status"] == "in_progress"
    assert len(replica.requests) == 2
    other = http(make_app(replica, kept=store, background=BRIEF))
    reading = asyncio.create_task(full.get(f"/v1/responses/{begun['id']}?stream=true"))
    assert text_of(await polled(other, begun["id"])) == ANSWER
    assert text_of(events_of((await reading).content)[-1]["response"]) == ANSWER
    assert len(replica.requests) == 3


async def test_nobody_tries_to_take_over_from_an_ingress_that_lives(
    replica: FakeReplica, make_app: MakeApp, http: Http, writes: Writes
) -> None:
    """A try takes a place for a moment, and one without a place waits before it reads on."""

    class CountingStore(MemoryJournalStore):
        tries = 0

        async def acquire(self, stream_id: str, owner: str) -> bool:
            self.tries += 1
            return await super().acquire(stream_id, owner)

    store = CountingStore(JournalLimits(lease_s=60))
    replica.scripts = [writes(pause_s=0.01)]
    begun = await create(http(make_app(replica, kept=store, background=BRIEF)), background=True)
    there = http(make_app(replica, kept=store, background=BRIEF))
    followed = events_of((await there.get(f"/v1/responses/{begun['id']}?stream=true")).content)
    assert text_of(followed[-1]["response"]) == ANSWER
    assert store.tries == 0


async def test_those_that_are_taken_over_at_once_need_places_too(
    replica: FakeReplica, make_app: MakeApp, http: Http
) -> None:
    class SlowStore(MemoryJournalStore):
        async def acquire(self, stream_id: str, owner: str) -> bool:
            await asyncio.sleep(0)
            return await super().acquire(stream_id, owner)

    store = SlowStore(JournalLimits(lease_s=60))
    replica.scripts = [lambda request: [None]]
    app = make_app(replica, kept=store, background=BRIEF)
    begun = [await create(http(app), background=True) for _ in range(3)]
    await app.state.responses.aclose()
    other = make_app(replica, kept=store, background=replace(BRIEF, max_background=1, lease_s=0.01))
    await asyncio.gather(*(http(other).get(f"/v1/responses/{each['id']}") for each in begun))
    assert len(replica.requests) == 4
    assert len(other.state.responses) == 3, "all are followed"
    (taken,) = [stream_id for stream_id, stream in other.state.responses._streams.items() if stream.in_background]
    await http(other).post(f"/v1/responses/resp_{taken}/cancel")
    await until(lambda: len(replica.requests) == 5)


async def test_they_are_limited_in_number(
    replica: FakeReplica, make_app: MakeApp, http: Http, store: MemoryJournalStore
) -> None:
    replica.scripts = [lambda request: [None]]
    settings = ResumeSettings(grace_s=0.0, lease_s=0.2, tick_s=0.01, refusal_s=0.01, max_background=2)
    api = http(make_app(replica, kept=store, background=settings))
    begun = [await create(api, background=True) for _ in range(2)]
    refused = await api.post("/v1/responses", json={**HI, "background": True})
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    await api.post(f"/v1/responses/{begun[0]['id']}/cancel")
    assert (await create(api, background=True))["status"] == "queued"


async def test_a_late_refusal_is_how_it_failed(
    replica: FakeReplica, make_app: MakeApp, http: Http, store: MemoryJournalStore
) -> None:
    replica.scripts = [lambda request: [0.2, Failure(FailureCode.OVERLOADED, "No place.")]]
    api = http(make_app(replica, kept=store, background=BRIEF))
    begun = await create(api, background=True)
    document = await polled(api, begun["id"])
    assert document["error"] == {"code": "rate_limit_exceeded", "message": "No place."}


async def test_it_is_kept_or_refused(api: httpx.AsyncClient) -> None:
    refused = await api.post("/v1/responses", json={**HI, "background": True, "store": False})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "store")


async def test_one_that_goes_on_can_not_be_continued_yet(
    replica: FakeReplica, make_app: MakeApp, http: Http, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_app.api.responses.kept._NEXT_TURN_S", 0.01)
    replica.scripts = [lambda request: [None]]
    api = http(make_app(replica, background=BRIEF))
    begun = await create(api, background=True)
    refused = await api.post("/v1/responses", json={**HI, "previous_response_id": begun["id"]})
    assert refused.status_code == 400
    assert "still queued" in refused.json()["error"]["message"]


async def test_one_whose_ingress_died_is_continued(
    replica: FakeReplica, make_app: MakeApp, http: Http, writes: Writes, store: MemoryJournalStore
) -> None:
    replica.scripts = [writes(pause_s=0.02), writes()]
    app = make_app(replica, kept=store, background=BRIEF)
    begun = await create(http(app), background=True)
    await app.state.responses.aclose()
    other = http(make_app(replica, kept=store, background=BRIEF))
    continued = await create(other, input="And then?", previous_response_id=begun["id"])
    assert continued["status"] == "completed"
    assert [len(request.output_token_ids) > 0 for request in replica.requests] == [False, True, False]
