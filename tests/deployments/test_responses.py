"""The Responses API on a cluster: two ingress replicas and two model replicas, and the ways to lose one of them."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import ray
from ray import serve
from unruly_model_server import POISON, UnrulyModelServer, write_weights

import serve_app.app
from serve_app.config import AppConfig
from serve_app.deployments.journal_actor import NAMESPACE, VERSION

pytestmark = pytest.mark.ray

APP = "responses"
TOKENS = 500
"""Some seconds of the unruly model server."""
FEW = 20
ASKED: list[dict[str, Any]] = [
    {"input": f"Once {n}", "max_output_tokens": TOKENS, "temperature": 0.0 if n % 2 else 1.0, "seed": n}
    for n in range(4)
]


@pytest.fixture(scope="module")
def url(
    text_folder: Path,
    shared_cache: Path,
    tmp_path_factory: pytest.TempPathFactory,
    deployed: Callable[..., str],
    until: Callable[..., httpx.Response],
) -> str:
    """A tiny random Llama, whose answers no token ends."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    shutil.copytree(text_folder, folder)
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "eos_token": None}))
    write_weights(folder, eos_token_id=None)
    config = AppConfig.model_validate(
        {
            "model": {"source": str(folder)},
            "engine": {"kv_cache_memory": "20MB", "max_running": 8, "prompt_lookup": False},
            "model_server": {"num_cpus": 0.5, "num_replicas": 2},
            "ingress": {"num_cpus": 0.2, "num_replicas": 2},
            "cache_dir": str(shared_cache),
        }
    )
    with pytest.MonkeyPatch.context() as patch:  # slow enough that an answer outlasts what is done to it
        patch.setattr(serve_app.app, "ModelServer", UnrulyModelServer)
        url = deployed(serve_app.app.build(config), APP)
    until(f"{url}/ready", lambda response: response.status_code == 200, times=20)
    return url


@pytest.fixture(scope="module")
def undisturbed(url: str) -> list[str]:
    """The text of each of `ASKED` when nothing happens."""

    async def ask() -> list[str]:
        async with httpx.AsyncClient(timeout=120) as client:
            answers = await asyncio.gather(
                *(client.post(f"{url}/v1/responses", json={**asked, "store": False}) for asked in ASKED)
            )
            return [text_of(answer.json()) for answer in answers]

    return asyncio.run(ask())


def text_of(document: dict[str, Any]) -> str:
    (message,) = document["output"]
    (part,) = message["content"]
    text: str = part["text"]
    return text


def pids(deployment: str) -> list[int]:
    """The processes of this cluster's replicas of a deployment."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if f"ServeReplica:{APP}:{deployment}" in " ".join(process.cmdline()):
                found.append(process.pid)
        except psutil.NoSuchProcess:
            continue
    return found


async def get(client: httpx.AsyncClient, url: str) -> httpx.Response:
    """What some ingress answers; a connection to one that has just died is tried again."""
    async with asyncio.timeout(60):
        while True:
            try:
                response = await client.get(url)
                if response.status_code < 500:
                    return response
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.1)


async def polled(client: httpx.AsyncClient, url: str) -> dict[str, Any]:
    async with asyncio.timeout(120):
        while True:
            document: dict[str, Any] = (await get(client, url)).json()
            if document["status"] not in ("queued", "in_progress"):
                return document
            await asyncio.sleep(0.1)


async def begun(client: httpx.AsyncClient, url: str, tokens: int = 30) -> list[str]:
    """The ids of all `ASKED` in the background, once each has said something."""
    ids = []
    for asked in ASKED:
        response = await client.post(f"{url}/v1/responses", json={**asked, "background": True})
        assert response.status_code == 200, response.text
        ids.append(response.json()["id"])
    for response_id in ids:
        async with client.stream("GET", f"{url}/v1/responses/{response_id}?stream=true") as response:
            async for line in response.aiter_lines():
                if f'"sequence_number":{tokens}' in line:
                    break
    return ids


def kept_responses() -> int:
    """Responses in the cluster's memory. One that was deleted counts until it expires."""
    actor = ray.get_actor(f"responses of {APP}, version {VERSION}", namespace=NAMESPACE)
    number: int = ray.get(actor.size.remote())[0]
    return number


async def test_what_is_kept_is_told_by_any_ingress(url: str, undisturbed: list[str]) -> None:
    async with httpx.AsyncClient(timeout=60) as client:
        first = (await client.post(f"{url}/v1/responses", json={**ASKED[1], "max_output_tokens": FEW})).json()
        before = kept_responses()
        assert POISON not in text_of(first), "the next turn's prompt has it"
        assert undisturbed[1].startswith(text_of(first).rstrip("\ufffd"))
        for _ in range(10):
            assert (await client.get(f"{url}/v1/responses/{first['id']}")).json() == first
        body = {"input": "And then?", "previous_response_id": first["id"], "max_output_tokens": 5}
        for _ in range(4):
            again = await client.post(f"{url}/v1/responses", json=body)
            assert again.json()["usage"]["input_tokens"] > FEW, again.text
        assert (await client.delete(f"{url}/v1/responses/{first['id']}")).status_code == 200
        for _ in range(4):
            assert (await client.get(f"{url}/v1/responses/{first['id']}")).status_code == 404
    assert kept_responses() == before + 4


async def test_a_background_response_outlives_its_ingress_and_its_replica(url: str, undisturbed: list[str]) -> None:
    async with httpx.AsyncClient(timeout=60) as client:
        ids = await begun(client, url)
        os.kill(pids("ModelServer")[0], signal.SIGKILL)
        ingresses = pids("Ingress")
        assert len(ingresses) == 2
        os.kill(ingresses[0], signal.SIGKILL)
        documents = [await polled(client, f"{url}/v1/responses/{response_id}") for response_id in ids]
    assert [text_of(document) for document in documents] == undisturbed
    assert {document["status"] for document in documents} == {"incomplete"}, "at their limit of tokens"


async def test_any_ingress_cancels_a_response(url: str, until: Callable[..., httpx.Response]) -> None:
    async with asyncio.timeout(180):
        while len(pids("Ingress")) < 2:  # noqa: ASYNC110 - Serve starts the one that was killed again
            await asyncio.sleep(0.1)
    await asyncio.to_thread(until, f"{url}/ready", lambda response: response.status_code == 200, times=20)
    async with httpx.AsyncClient(timeout=60) as client:
        ids = await begun(client, url, 10)
        for response_id in ids:
            cancelled = await client.post(f"{url}/v1/responses/{response_id}/cancel")
            assert cancelled.json()["status"] == "cancelled", cancelled.text
        for response_id in ids * 2:
            assert (await client.get(f"{url}/v1/responses/{response_id}")).json()["status"] == "cancelled"
    handle = serve.get_deployment_handle("ModelServer", APP)
    async with asyncio.timeout(30):
        while (await handle.stats.remote()).running:  # noqa: ASYNC110 - of what other processes do
            await asyncio.sleep(0.05)
