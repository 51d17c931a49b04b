"""Resume as clients do it, over real connections that are cut anywhere: ours, OpenAI's, and an EventSource."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import openai
import pytest
from cutting_proxy import cutting_proxy
from fake_replica import ALIVE, FakeReplica, Script, Step
from starlette.applications import Starlette

from serve_app.client import AsyncClient, BadRequest, Client, ConnectionLost, StreamError
from serve_app.client import resume as client_resume
from serve_app.core import Failure, FailureCode, TokenBatch
from serve_app.generation.replica import ReplicaLost
from serve_app.resume.journal_store import JournalLimits
from serve_app.resume.memory_store import MemoryJournals, MemoryJournalStore

ANSWER = "The quick brown fox says 🙂 and naïve."
HI = [{"role": "user", "content": "Hi"}]
MakeApp = Callable[..., Starlette]
Serve = Callable[[Starlette], Awaitable[str]]
Writes = Callable[..., Script]

EVENT_SOURCE = """
import { EventSource } from 'eventsource'
const source = new EventSource(process.argv[2])
let text = '', opened = 0
source.addEventListener('open', () => { opened += 1 })
source.addEventListener('message', event => { text += JSON.parse(event.data).generated_text })
source.addEventListener('done', event => { console.log(JSON.stringify({ done: JSON.parse(event.data) })) })
source.addEventListener('error', event => {
  if (source.readyState === EventSource.CLOSED) {
    console.log(JSON.stringify({ text, opened, code: event.code }))
    process.exit(0)
  }
})
"""


@pytest.fixture(autouse=True)
def quick_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_resume, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(client_resume, "LONGEST_PAUSE_S", 0.01)


def cuts(seed: int, longest: int = 900) -> Callable[[], int | None]:
    """Somewhere in the headers, in an event or between two; one connection in five lives."""
    chance = random.Random(seed)
    return lambda: None if chance.random() < 0.2 else chance.randrange(400, 400 + longest)


@pytest.mark.parametrize("seed", range(8))
async def test_our_client_yields_every_document_once(
    replica: FakeReplica, make_app: MakeApp, serve: Serve, writes: Writes, seed: int
) -> None:
    replica.scripts = [writes(pause_s=0.001)]
    store = MemoryJournalStore(JournalLimits(lease_s=60))
    url = await serve(make_app(replica, journals=store))
    async with (
        cutting_proxy(url, cuts(seed)) as (proxied, proxy),
        AsyncClient(proxied) as client,
        client.stream(messages=HI, resume=True, seed=7) as stream,  # type: ignore[arg-type]
    ):
        documents = [document async for document in stream]
    assert "".join(document.generated_text for document in documents) == ANSWER
    assert stream.done is not None
    assert len(documents) == stream.done.usage.completion_tokens
    assert len(replica.requests) == 1
    assert proxy.connections == proxy.cuts + 1


async def test_the_blocking_client_does_too(
    replica: FakeReplica, make_app: MakeApp, serve: Serve, writes: Writes
) -> None:
    replica.scripts = [writes(pause_s=0.001)]
    url = await serve(make_app(replica))
    async with cutting_proxy(url, cuts(3)) as (proxied, proxy):

        def ask() -> str:
            with Client(proxied) as client:
                return client.complete(messages=HI, resume=True).text  # type: ignore[arg-type]

        assert await asyncio.to_thread(ask) == ANSWER
    assert proxy.cuts >= 1


async def test_without_resume_a_cut_is_an_error(
    replica: FakeReplica, make_app: MakeApp, serve: Serve, writes: Writes
) -> None:
    replica.scripts = [writes(pause_s=0.001)]
    url = await serve(make_app(replica))
    async with cutting_proxy(url, lambda: 700) as (proxied, _), AsyncClient(proxied) as client:
        with pytest.raises(ConnectionLost):
            await client.complete(messages=HI)  # type: ignore[arg-type]


async def test_attempts_without_progress_are_bounded(
    replica: FakeReplica, make_app: MakeApp, serve: Serve, writes: Writes
) -> None:
    replica.scripts = [writes(pause_s=0.001)]
    url = await serve(make_app(replica))
    first = iter([700])
    async with cutting_proxy(url, lambda: next(first, 50)) as (proxied, proxy), AsyncClient(proxied) as client:
        with pytest.raises(ConnectionLost):
            await client.complete(messages=HI, resume=True)  # type: ignore[arg-type]
    assert proxy.connections == 1 + client_resume.ATTEMPTS


async def test_an_expired_stream_is_told_at_once(
    replica: FakeReplica, make_app: MakeApp, serve: Serve, writes: Writes
) -> None:
    now_s = 0.0
    limits = JournalLimits(expiry_s=60)
    store = MemoryJournalStore(limits)
    store.journals = MemoryJournals(limits, lambda: now_s)

    async def expire() -> None:
        """Before the client comes back: the stream has ended, and so long ago that its journal is gone."""
        nonlocal now_s
        if proxy.connections > 1:
            async with asyncio.timeout(60):
                while any(task.get_name().startswith("stream ") for task in asyncio.all_tasks()):  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
            now_s += 61

    url = await serve(make_app(replica, journals=store))
    async with cutting_proxy(url, lambda: 700, expire) as (proxied, proxy), AsyncClient(proxied) as client:
        with pytest.raises(BadRequest) as raised:
            await client.complete(messages=HI, resume=True)  # type: ignore[arg-type]
    assert (raised.value.status, raised.value.code) == (410, "stream_gone")
    assert proxy.connections == 2


async def test_an_error_of_the_stream_is_raised_once(
    replica: FakeReplica, make_app: MakeApp, serve: Serve, writes: Writes
) -> None:
    failure = Failure(FailureCode.ENGINE_FAILED, "It broke.")
    replica.scripts = [lambda request: [*list(writes(pause_s=0.001, end=None)(request))[:8], failure]]
    url = await serve(make_app(replica))
    async with cutting_proxy(url, lambda: 900) as (proxied, proxy), AsyncClient(proxied) as client:
        with pytest.raises(StreamError, match=r"It broke"):
            await client.complete(messages=HI, resume=True)  # type: ignore[arg-type]
    assert proxy.connections >= 1
    assert len(replica.requests) == 1


@pytest.mark.parametrize("logprobs", [True, False])
async def test_openais_client_reads_numbered_events_and_heartbeats(
    replica: FakeReplica, make_app: MakeApp, serve: Serve, writes: Writes, logprobs: bool
) -> None:
    replica.scripts = [writes(pause_s=0.02)]
    url = await serve(make_app(replica, stream={"heartbeat_s": 0.01}))
    async with openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key="unused", default_headers={"X-Stream-Resume": "1"}, max_retries=0
    ) as client:
        chunks = await client.chat.completions.create(
            model="tiny",
            messages=HI,  # type: ignore[arg-type]
            stream=True,
            logprobs=logprobs,
            stream_options={"include_usage": True},
        )
        text, usage = "", None
        async for chunk in chunks:
            usage = chunk.usage or usage
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
        assert text == ANSWER
        assert usage is not None
        assert usage.completion_tokens > 5
        pieces = await client.completions.create(model="tiny", prompt="Once", stream=True)
        assert "".join([chunk.choices[0].text async for chunk in pieces]) == ANSWER
        whole = await client.chat.completions.create(model="tiny", messages=HI)  # type: ignore[arg-type]
        assert whole.choices[0].message.content == ANSWER


@pytest.mark.parametrize("resume", ["0", "1"])
async def test_openais_client_waits_for_a_place_and_for_a_replica(
    replica: FakeReplica, make_app: MakeApp, serve: Serve, writes: Writes, resume: str
) -> None:
    waits: list[Step] = [0.1, TokenBatch(0), 0.1]
    replica.scripts = [
        lambda request: [ALIVE, *waits, *list(writes()(request))[:8], ReplicaLost("died")],
        lambda request: [0.1, ReplicaLost("none is up", taken=False)],
        lambda request: [0.1, *writes()(request)],
    ]
    url = await serve(make_app(replica, stream={"heartbeat_s": 0.01}))
    async with (
        cutting_proxy(url, lambda: None) as (proxied, proxy),
        openai.AsyncOpenAI(
            base_url=f"{proxied}/v1", api_key="unused", default_headers={"X-Stream-Resume": resume}, max_retries=0
        ) as client,
    ):
        chunks = await client.chat.completions.create(model="tiny", messages=HI, stream=True)  # type: ignore[arg-type]
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in chunks]) == ANSWER
    assert len(replica.requests) == 3
    # Each wait but the first, which may begin before the stream does, has one before its end however late that is.
    assert proxy.passed.count(b": ping\n") >= 3


@pytest.fixture(scope="module")
def event_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program above, beside npm's `eventsource`. Skips where it can't be installed."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("node and npm are not installed (Debian: apt install nodejs npm)")
    folder = tmp_path_factory.mktemp("eventsource")
    command = [npm, "install", "--prefix", str(folder), "--no-audit", "--no-fund", "eventsource@4"]
    try:
        installed = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip("npm can't install eventsource here: it took longer than two minutes")
    if installed.returncode != 0:
        pytest.skip(f"npm can't install eventsource here: {installed.stderr.strip()[-200:]}")
    program = folder / "read.mjs"
    program.write_text(EVENT_SOURCE)
    return program


async def test_an_event_source_continues_by_itself_and_is_ended_by_204(
    replica: FakeReplica, make_app: MakeApp, serve: Serve, writes: Writes, event_source: Path
) -> None:
    replica.scripts = [writes(pause_s=0.001)]
    url = await serve(make_app(replica))
    lengths = iter([800, None])
    async with cutting_proxy(url, lambda: next(lengths, None)) as (proxied, proxy):
        path = f"{proxied}/stream?prompt=Once&resume=1"
        node = await asyncio.create_subprocess_exec(
            "node", str(event_source), path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        try:
            async with asyncio.timeout(60):
                out, err = await node.communicate()
        finally:
            if node.returncode is None:
                node.kill()
    assert not err, err.decode()
    done, end = [json.loads(line) for line in out.splitlines()]
    assert done["done"]["finish_reason"] == "stop"
    assert end == {"text": ANSWER, "opened": 2, "code": 204}
    assert proxy.cuts == 1
    assert proxy.connections in (2, 3)  # the second one is kept for the request that gets 204, unless that comes late
    assert len(replica.requests) == 1


async def test_curl_users_find_the_id_in_the_headers(replica: FakeReplica, make_app: MakeApp, serve: Serve) -> None:
    url = await serve(make_app(replica))
    async with httpx.AsyncClient() as client:
        first = await client.get(f"{url}/stream?prompt=Once&resume=1")
        again = await client.get(f"{url}/v1/streams/{first.headers['x-stream-id']}")
        assert again.text == first.text
        assert again.headers["x-seed"] == first.headers["x-seed"]
