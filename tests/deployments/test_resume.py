"""Resume on a cluster: two ingress replicas over a real (tiny, random) model, and the ways to lose one of them."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import ray
from ray import serve
from unruly_model_server import UnrulyModelServer, write_weights

import serve_app.app
from serve_app.client import AsyncClient, Completion, Done, ModelOutputDocument
from serve_app.client.protocol import joined
from serve_app.config import AppConfig
from serve_app.deployments.journal_actor import NAMESPACE, VERSION

pytestmark = pytest.mark.ray

APP = "resume"
TOKENS, LONG = 600, 1000
"""Some seconds of the unruly model server, and nearly all that its context holds."""
RESUME = {"X-Stream-Resume": "1"}
ASKED: list[dict[str, Any]] = [
    {"prompt": f"Once {n}", "max_tokens": TOKENS, "temperature": 0.0 if n % 2 else 1.0, "seed": n} for n in range(8)
]


@pytest.fixture(scope="module")
def folder(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a tokenizer. No token ends its answers: each is as long as it is asked to be."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    shutil.copytree(text_folder, folder)
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "eos_token": None}))
    write_weights(folder, eos_token_id=None)
    return folder


@pytest.fixture(scope="module")
def application(folder: Path, shared_cache: Path) -> Callable[[], serve.Application]:
    """The same one each time."""
    config = AppConfig.model_validate(
        {
            "model": {"source": str(folder)},
            # Without guesses, by which answers that repeat themselves would be over too soon.
            "engine": {"kv_cache_memory": "20MB", "max_running": 8, "prompt_lookup": False},
            "model_server": {"num_cpus": 0.5},
            "ingress": {"num_cpus": 0.2, "num_replicas": 2},
            "streams": {"grace_s": 5},
            "cache_dir": str(shared_cache),
        }
    )

    def make() -> serve.Application:
        with pytest.MonkeyPatch.context() as patch:  # slow enough that an answer outlasts what is done to it
            patch.setattr(serve_app.app, "ModelServer", UnrulyModelServer)
            return serve_app.app.build(config)

    return make


def is_ready(response: httpx.Response) -> bool:
    return response.status_code == 200


@pytest.fixture(scope="module")
def url(
    deployed: Callable[..., str], until: Callable[..., httpx.Response], application: Callable[[], serve.Application]
) -> str:
    url = deployed(application(), APP)
    until(f"{url}/ready", is_ready, times=20)  # each of the two has loaded its tokenizer
    return url


@pytest.fixture
async def client(url: str) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(url) as client:
        yield client


@pytest.fixture(scope="module")
def undisturbed(url: str) -> list[Completion]:
    """What each of `ASKED` gets when nothing happens."""

    async def ask() -> list[Completion]:
        async with AsyncClient(url) as client:
            return list(await asyncio.gather(*(client.complete(**asked) for asked in ASKED)))

    return asyncio.run(ask())


def ingress_pids() -> list[int]:
    """The processes of this cluster's ingress replicas."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if f"ServeReplica:{APP}:Ingress" in " ".join(process.cmdline()):
                found.append(process.pid)
        except psutil.NoSuchProcess:
            continue
    return found


async def both_ingresses(url: str, until: Callable[..., httpx.Response]) -> None:
    """Until there are two ingress replicas, and both have loaded their tokenizers."""
    async with asyncio.timeout(180):
        while len(ingress_pids()) < 2:  # noqa: ASYNC110 - Serve starts them
            await asyncio.sleep(0.1)
    await asyncio.to_thread(until, f"{url}/ready", is_ready, times=20)


async def running() -> int:
    """Requests that the model replica computes."""
    handle = serve.get_deployment_handle("ModelServer", APP)
    return int((await handle.stats.remote()).running)


async def output_tokens() -> int:
    """That the model replica has computed since its start."""
    handle = serve.get_deployment_handle("ModelServer", APP)
    return int((await handle.stats.remote()).counters.output_tokens)


async def test_an_ingress_that_is_killed_costs_a_pause(
    client: AsyncClient, undisturbed: list[Completion], url: str
) -> None:
    begun = [asyncio.Event() for _ in ASKED]

    async def ask(number: int) -> Completion:
        documents = []
        async with client.stream(**ASKED[number], resume=True) as stream:
            async for document in stream:
                documents.append(document)
                if len(documents) == 50:
                    begun[number].set()
        assert stream.done is not None
        return joined(documents, stream.done)

    asking = [asyncio.create_task(ask(number)) for number in range(len(ASKED))]
    async with asyncio.timeout(120):
        await asyncio.gather(*(event.wait() for event in begun))
    pids = ingress_pids()
    assert len(pids) == 2
    os.kill(pids[0], signal.SIGKILL)
    async with asyncio.timeout(60):
        answers = await asyncio.gather(*asking)
    assert [answer.text for answer in answers] == [answer.text for answer in undisturbed]
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in undisturbed]
    assert await running() == 0


async def test_what_a_killed_ingress_asked_for_is_given_up(url: str, until: Callable[..., httpx.Response]) -> None:
    """Also of clients that did not ask for resume: they get a connection error."""
    await both_ingresses(url, until)  # Serve replaces the one that was killed before

    async def ask(client: httpx.AsyncClient, asked: dict[str, Any]) -> str:
        """What went wrong."""
        response = await client.post(f"{url}/stream", json={**asked, "max_tokens": LONG})
        return f"{response.status_code} {response.text[-200:]}"

    before = await output_tokens()
    model_server = serve.get_deployment_handle("ModelServer", APP)
    async with httpx.AsyncClient(timeout=60) as client:
        asking = [asyncio.create_task(ask(client, asked)) for asked in ASKED]
        async with asyncio.timeout(30):
            while await running() < len(ASKED) or not await model_server.knows_its_ingresses.remote():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        for pid in ingress_pids():
            os.kill(pid, signal.SIGKILL)
        answers = await asyncio.gather(*asking, return_exceptions=True)
        wrong = [answer for answer in answers if not isinstance(answer, httpx.TransportError)]
        assert all(isinstance(answer, str) and answer.startswith("500") for answer in wrong), wrong
        async with asyncio.timeout(60):
            while await running():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        computed = await output_tokens() - before
        assert computed < 0.9 * LONG * len(ASKED), f"{computed} of {LONG * len(ASKED)} tokens were computed"
    await both_ingresses(url, until)


async def test_any_ingress_answers_from_the_journal(url: str, until: Callable[..., httpx.Response]) -> None:
    async with httpx.AsyncClient(timeout=30) as client:
        first = await client.post(
            f"{url}/stream", json={**ASKED[1], "max_tokens": 20}, headers={"X-Stream-Resume": "1"}
        )
        stream_id = first.headers["x-stream-id"]
        events = first.text.removeprefix("retry: 1000\n").split("\n\n")[:-1]
        ids = [event.partition("\n")[0].removeprefix("id: ") for event in events]
        for position, event_id in enumerate(ids[:20], 1):
            again = await client.get(f"{url}/v1/streams/{stream_id}", headers={"Last-Event-ID": event_id})
            assert again.text.removeprefix("retry: 1000\n").split("\n\n")[:-1] == events[position:]
        headers = {"Last-Event-ID": ids[-1]}
        assert (await client.get(f"{url}/v1/streams/{stream_id}", headers=headers)).status_code == 204
        assert (await client.get(f"{url}/v1/streams/{'A' * 22}")).status_code == 410
    assert log_files_with("endpoint=/v1/streams/{stream_id} status=204"), "these are the logs"
    assert log_files_with(stream_id) == []


def log_files_with(text: str) -> list[str]:
    """Of all that Ray and Serve log on this cluster."""
    folder = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs"
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path.name for path in files if text.encode() in path.read_bytes()]


async def test_a_client_that_never_comes_back_is_given_up(url: str) -> None:
    body = {**ASKED[1], "max_tokens": LONG}
    before = await output_tokens()
    async with httpx.AsyncClient(timeout=30) as client:
        async with client.stream("POST", f"{url}/stream", json=body, headers={"X-Stream-Resume": "1"}) as response:
            await anext(response.aiter_bytes())
        assert await running() == 1
        async with asyncio.timeout(60):
            while await running():  # noqa: ASYNC110 - of what other processes do
                await asyncio.sleep(0.05)
        assert await output_tokens() - before < 0.95 * LONG


def documents(body: str) -> list[dict[str, Any]]:
    """Of the events that are whole in it."""
    events = body.split("\n\n")[:-1]
    return [json.loads(line[6:]) for event in events for line in event.split("\n") if line.startswith("data: ")]


async def test_journals_outlive_the_application(
    url: str,
    undisturbed: list[Completion],
    deployed: Callable[..., str],
    until: Callable[..., httpx.Response],
    application: Callable[[], serve.Application],
) -> None:
    async with httpx.AsyncClient(timeout=60) as client:
        async with client.stream("POST", f"{url}/stream", json=ASKED[0], headers=RESUME) as response:
            stream_id, body = response.headers["x-stream-id"], ""
            async for piece in response.aiter_text():
                body += piece
                if len(documents(body)) > 50:
                    break
        await asyncio.to_thread(serve.delete, APP)
        assert (await client.get(f"{url}/ready")).status_code == 404
        journals, _ = ray.get(journal_actor().size.remote())
        assert journals > 0
        assert await asyncio.to_thread(deployed, application(), APP) == url
        await both_ingresses(url, until)
        seen = documents(body)
        headers = {"Last-Event-ID": f"{stream_id}:{len(seen)}"}
        rest = await client.get(f"{url}/v1/streams/{stream_id}", headers=headers)
    assert rest.status_code == 200
    *answer, done = seen + documents(rest.text)
    assert joined([ModelOutputDocument.parse(document) for document in answer], Done.parse(done)) == undisturbed[0]


async def test_a_journal_actor_that_was_killed_is_replaced(url: str, client: AsyncClient) -> None:
    ray.kill(journal_actor())
    again = await client.complete(**{**ASKED[0], "max_tokens": 20}, resume=True)
    assert again.done.usage.completion_tokens == 20


def journal_actor() -> ray.actor.ActorHandle:
    return ray.get_actor(f"journals of {APP}, version {VERSION}", namespace=NAMESPACE)
