"""Answers over HTTP while model replicas die under them: the text, logprobs and usage of an undisturbed run."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from shutil import copytree
from typing import Any

import httpx
import openai
import psutil
import pytest
import ray
from answers import CHAT, Answer, body_of, post
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from unruly_model_server import POISON, UnrulyModelServer, write_weights

import serve_app.app
from serve_app.config import AppConfig
from serve_app.generation.attempt_history import FailoverSettings

pytestmark = pytest.mark.ray

APP = "failover"
SAMPLED = {"temperature": 1.0, "top_p": 0.95, "seed": 11}
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": (CHAT, {"temperature": 0, "stream": True}),
    "sampled, whole": (CHAT, SAMPLED),
    "penalties": (CHAT, SAMPLED | {"presence_penalty": 0.7, "frequency_penalty": 0.7, "stream": True}),
    "repetition": ("/stream", SAMPLED | {"repetition_penalty": 1.3}),
    "stop string": (CHAT, SAMPLED | {"stop": ["filled in below"], "stream": True}),
    "min_tokens": (CHAT, SAMPLED | {"min_tokens": 100, "ignore_eos": False, "stream": True}),
    "logprobs": (CHAT, SAMPLED | {"logprobs": True, "top_logprobs": 3, "stream": True}),
    "three choices": (CHAT, SAMPLED | {"n": 3, "stream": True}),
    "three choices, whole": (CHAT, SAMPLED | {"n": 3, "logprobs": True}),
}
STREAMED = {name for name, (path, fields) in REQUESTS.items() if path == "/stream" or fields.get("stream")}
WHOLE = sum(fields.get("n", 1) for name, (_, fields) in REQUESTS.items() if name not in STREAMED)
"""Choices that nobody sees grow. Of all choices they are less than half."""
SILENCE_S = FailoverSettings().silence_s
"""After which a replica is left that says nothing."""


async def ask(client: httpx.AsyncClient, url: str, name: str, answer: Answer | None = None) -> Answer:
    path, fields = REQUESTS[name]
    return await post(client, url + path, body_of(path, fields), answer or Answer())


async def read_with_openais_client(url: str, reading: asyncio.Event) -> str:
    """The text of the greedy request, as openai-python reads it; `reading` is set with its first piece."""
    fields = body_of(CHAT, REQUESTS["greedy"][1])
    extensions = {"ignore_eos": fields.pop("ignore_eos")}
    text = ""
    async with openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key="unused", default_headers={"X-Stream-Resume": "1"}, max_retries=0
    ) as client:
        async for chunk in await client.chat.completions.create(**fields, extra_body=extensions):
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
            if text:
                reading.set()
    return text


class Service:
    """The application, its replicas' processes, and what it answers undisturbed."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.handle = serve.get_deployment_handle("ModelServer", APP)
        self.expected: dict[str, Any] = {}

    async def replicas(self) -> dict[int, int]:
        """How many requests each process computes."""
        await self.handle.where.remote()  # a new handle knows no replica yet
        return dict(await self.handle.broadcast("where").results_async())

    async def whole(self, count: int) -> None:
        """Until all replicas are there again."""
        deadline = time.monotonic() + 180
        while True:
            states = (await asyncio.to_thread(serve.status)).applications[APP].deployments["ModelServer"].replica_states
            if states == {"RUNNING": count}:
                with suppress(Exception):  # a call to one that is already dead
                    if len(await self.replicas()) == count:
                        return
            assert time.monotonic() < deadline, states
            await asyncio.sleep(0.1)

    async def under(self, disturbance: Callable[[], Awaitable[Any]] | None = None) -> dict[str, Answer]:
        """All requests at once, and once their streams flow the disturbance."""
        answers = {name: Answer() for name in REQUESTS}
        async with httpx.AsyncClient(timeout=120) as client, asyncio.TaskGroup() as tasks:
            for name, answer in answers.items():
                tasks.create_task(ask(client, self.url, name, answer))
            for name, answer in answers.items():
                if name in STREAMED:
                    await answer.flowing()
            if disturbance is not None:
                await disturbance()
        for name, answer in answers.items():
            assert answer.summary() == self.expected[name], name
        return answers

    async def hit(self, strike: Callable[[int], Awaitable[bool]]) -> tuple[int, dict[str, Answer]]:
        """All requests at once, and `strike` the process of most of them, which says whether there was a stream."""
        struck: list[int] = []

        async def once() -> None:
            running = await self.replicas()
            most = max(running, key=lambda pid: running[pid])
            if await strike(most):
                struck.append(most)

        for _ in range(5):  # again, when the machine was so slow to tell that the answers were already over
            answers = await self.under(once)
            if struck:
                return struck[0], answers
        raise AssertionError("no replica ever computed a streamed answer when it was to be struck")

    async def send(self, number: signal.Signals, pid: int) -> bool:
        """A strike: the replica sends itself a signal while it computes a stream. Whether it did."""
        responses = self.handle.broadcast("strike", pid, number, WHOLE)
        telling = asyncio.ensure_future(responses.results_async())
        try:
            async with asyncio.timeout(60):
                while True:
                    if stopped_or_dead(pid):
                        return True
                    if telling.done() and telling.exception() is None:
                        return stopped_or_dead(pid)
                    await asyncio.sleep(0.01)
        finally:
            telling.cancel()

    async def break_engine(self, pid: int) -> bool:
        """A strike: its next step fails. Serve is not told of it until `hide_illness` is called again."""
        await self.handle.broadcast("hide_illness", True).results_async()
        return any(await self.handle.broadcast("break_engine", pid, WHOLE).results_async())

    async def moved(self, answers: dict[str, Answer]) -> set[str]:
        """Names of those that a replica computed from a token on that another one had computed before."""
        async with asyncio.timeout(60):
            while True:
                with suppress(RayError, RayServeException):  # of one that has died, and is not yet known to
                    continued = set().union(*await self.handle.broadcast("continued").results_async())
                    return {name for name, answer in answers.items() if answer.request_id in continued}
                await asyncio.sleep(0.1)


def longest_pause_s(answers: dict[str, Answer]) -> float:
    """Of those that are streamed."""
    return max(answer.longest_pause_s for name, answer in answers.items() if name in STREAMED)


def waited_for_silence(answers: dict[str, Answer]) -> set[str]:
    """Names of those that left a replica since it said nothing for long, as the ingress's log has it."""
    logs = Path(ray.get_runtime_context().worker.node.get_logs_dir_path())
    lines = [
        line
        for log in logs.glob(f"serve/replica_{APP}_Ingress_*.log")
        for line in log.read_text().splitlines()
        if f"nothing came for {SILENCE_S:g} s" in line
    ]
    return {name for name, answer in answers.items() if any(answer.request_id in line for line in lines)}


def stopped_or_dead(pid: int) -> bool:
    """Whether a signal has had its effect."""
    try:
        return psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return True


def replica_processes() -> set[int]:
    """Of the model, from the moment on that they have their names."""
    title = f"ray::ServeReplica:{APP}:ModelServer"
    children = psutil.Process().children(recursive=True)
    with suppress(psutil.NoSuchProcess):
        return {child.pid for child in children if title in " ".join(child.cmdline())}
    return set()


@pytest.fixture(scope="module")
def config(text_folder: Path, shared_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("failover")
    copytree(text_folder, folder / "tiny-chat")
    write_weights(folder / "tiny-chat")
    return {
        "model": {"source": str(folder / "tiny-chat")},
        # Without guesses, by which answers that repeat themselves would be over too soon.
        "engine": {"kv_cache_memory": "16MiB", "max_running": 24, "prompt_lookup": False},
        "model_server": {"num_replicas": 2, "num_cpus": 0.2, "max_surge_percent": 100},
        "ingress": {"num_cpus": 0.2, "graceful_shutdown_timeout_s": 30},
        "api": {"heartbeat_s": 0.5},
        "cache_dir": str(shared_cache),
    }


@pytest.fixture(scope="module")
def application(config: dict[str, Any]) -> Callable[..., serve.Application]:
    """`application(engine=...)`: the whole one with the unruly model server, and changes of the config."""

    def make(**changes: Any) -> serve.Application:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(serve_app.app, "ModelServer", UnrulyModelServer)
            merged = {key: config[key] | changes.get(key, {}) if key in changes else config[key] for key in config}
            return serve_app.app.build(AppConfig.model_validate(merged))

    return make


@pytest.fixture(scope="module")
def service(
    deployed: Callable[..., str], until: Callable[..., httpx.Response], application: Callable[..., serve.Application]
) -> Service:
    url = deployed(application(), APP)
    card = until(f"{url}/ready", lambda response: response.status_code == 200).json()["model"]
    assert card["batch_invariant"], card
    service = Service(url)

    async def undisturbed() -> None:
        async with httpx.AsyncClient(timeout=60) as client:
            sampled = await ask(client, url, "sampled, whole")
            REQUESTS["stop string"][1]["stop"] = [sampled.choices[0]["text"][150:153]]  # near the end
            answers = await asyncio.gather(*(ask(client, url, name) for name in REQUESTS))
            service.expected.update({name: a.summary() for name, a in zip(REQUESTS, answers, strict=True)})

    asyncio.run(undisturbed())
    for name, (status, _, usage, error) in service.expected.items():
        assert (status, error) == (200, None), name
        assert usage, name
    assert all(choice["text"] for _, choices, _, _ in service.expected.values() for choice in choices.values())
    return service


async def test_a_killed_replica_changes_no_answer(service: Service) -> None:
    await service.whole(2)
    _, answers = await service.hit(partial(service.send, signal.SIGKILL))
    assert await service.moved(answers) & STREAMED
    assert not waited_for_silence(answers), "a death is noticed, not waited for"


async def test_a_frozen_replica_is_left_after_five_seconds_and_not_asked_again(service: Service) -> None:
    await service.whole(2)
    running = await service.replicas()
    try:
        _, answers = await service.hit(partial(service.send, signal.SIGSTOP))
        again = await service.under()
    finally:
        for pid in running:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    moved = await service.moved(answers)
    assert moved & STREAMED
    waited = waited_for_silence(answers)
    assert waited
    assert waited <= moved, "who was not there did not wait"
    assert longest_pause_s(answers) < 2 * SILENCE_S, "with it the others leave, whose channel is given up"
    assert not waited_for_silence(again)


async def test_replicas_that_die_in_an_update_are_replaced(
    service: Service, application: Callable[..., serve.Application]
) -> None:
    """Serve takes their deaths for failures of the new version, and without tries left it would replace none.

    Answers are written all the while.
    """
    await service.whole(2)
    before = set(await service.replicas())
    target = serve.RunTarget(application(engine={"max_running": 12}), name=APP, route_prefix=f"/{APP}")
    await asyncio.to_thread(serve.run_many, [target], wait_for_applications_running=False)

    async def kill_two_of_the_new() -> None:
        killed: set[int] = set()
        async with asyncio.timeout(180):
            while len(killed) < 2:
                for pid in await asyncio.to_thread(replica_processes) - before - killed:
                    killed.add(pid)
                    os.kill(pid, signal.SIGKILL)
                await asyncio.sleep(0.1)

    await asyncio.gather(kill_two_of_the_new(), service.under())
    async with asyncio.timeout(180):
        while before & set(await service.replicas()):
            await service.under()
    await service.whole(2)


async def test_streams_wait_for_the_successor_of_the_last_replica(service: Service) -> None:
    for _ in range(5):  # again, when the machine was so slow that the answers were already over
        await service.whole(2)
        reading, in_time = asyncio.Event(), asyncio.Event()
        openais = asyncio.create_task(read_with_openais_client(service.url, reading))

        async def kill_all(
            reading: asyncio.Event = reading, in_time: asyncio.Event = in_time, openais: asyncio.Task[str] = openais
        ) -> None:
            await asyncio.wait_for(reading.wait(), 120)
            if not openais.done():
                in_time.set()
            for pid in await service.replicas():
                os.kill(pid, signal.SIGKILL)

        answers = await service.under(kill_all)
        assert await openais == service.expected["greedy"][1][0]["text"]
        waited = [answers[name] for name in await service.moved(answers) & STREAMED]
        if in_time.is_set() and len(waited) > 3:
            break
    else:
        raise AssertionError("the answers were over each time")
    assert min(answer.longest_pause_s for answer in waited) > 1, "a process and its imports"
    assert min(answer.heartbeats for answer in waited) > 1


async def test_a_request_that_kills_replicas_is_refused_and_what_is_beside_it_is_answered(service: Service) -> None:
    await service.whole(2)
    before = set(await service.replicas())
    poison, beside = Answer(), {name: Answer() for name in REQUESTS}

    async def poisoned() -> None:
        body = body_of(CHAT, {"stream": True}, text=POISON)
        async with httpx.AsyncClient(timeout=120) as client, asyncio.TaskGroup() as tasks:
            tasks.create_task(post(client, service.url + CHAT, body, poison))
            for name, answer in beside.items():  # these have no token yet when the first replica dies
                tasks.create_task(ask(client, service.url, name, answer))

    await service.under(poisoned)
    assert poison.error is not None
    assert poison.error["code"] == "request_killed_replica"
    assert "2 model replicas died while they computed only this request" in poison.error["message"]
    assert not poison.choices or not poison.choices[0]["text"]
    for name, answer in beside.items():
        assert answer.summary() == service.expected[name], name
    await service.whole(2)
    assert not before & set(await service.replicas()), "each died at least once"


async def test_a_replica_whose_engine_has_failed_is_left_and_replaced(service: Service) -> None:
    await service.whole(2)
    broken, answers = await service.hit(service.break_engine)
    assert not waited_for_silence(answers)
    os.kill(broken, 0)  # its process lives, and is idle: the first that new requests would be given to
    assert not waited_for_silence(await service.under())
    assert await service.moved(answers) & STREAMED
    os.kill(broken, 0)
    await service.handle.broadcast("hide_illness", False).results_async()
    deadline = time.monotonic() + 180
    while psutil.pid_exists(broken):
        assert time.monotonic() < deadline, "Serve has not replaced it"
        await asyncio.sleep(0.1)


async def test_streams_wait_for_the_successor_of_the_last_engine(service: Service) -> None:
    """Until then there are only replicas that live and refuse."""
    await service.whole(2)

    async def break_all() -> None:
        for pid in await service.replicas():
            await service.handle.broadcast("break_engine", pid).results_async()

    answers = await service.under(break_all)
    assert await service.moved(answers) & STREAMED


async def test_an_update_whose_model_can_not_be_loaded_leaves_the_old_one(
    service: Service, application: Callable[..., serve.Application]
) -> None:
    """The last one here: Serve goes on wanting the version that can't be had."""
    await service.whole(2)
    before = await service.replicas()
    target = serve.RunTarget(application(model={"source": "/no/such/model"}), name=APP, route_prefix=f"/{APP}")
    with pytest.raises(RuntimeError):
        await asyncio.to_thread(serve.run_many, [target])
    await service.under()
    async with httpx.AsyncClient(timeout=60) as client:
        assert (await client.get(f"{service.url}/ready")).json()["status"] == "ready"
    assert set(await service.replicas()) == set(before), "the old version's processes, untouched"


async def test_streams_whose_weights_are_gone_end_with_an_error_that_says_so(
    service: Service, application: Callable[..., serve.Application], tmp_path: Path, config: dict[str, Any]
) -> None:
    """After the one above: the version that could not be had is given up for one that can."""
    other = copytree(config["model"]["source"], tmp_path / "other")
    write_weights(other, seed=8)
    # 900 steps of 0.1 s: no answer ends before its replica is killed. /stream has no `ignore_eos`, so it is asked at
    # temperature 0: this model then repeats itself and makes no end token.
    await service.handle.broadcast("pace", 0.1).results_async()
    native, chat = {"max_tokens": 900, "temperature": 0}, {"max_tokens": 900, "stream": True}
    asked = {
        "native": ("/stream", {}),
        "native, resumable": ("/stream", {"X-Stream-Resume": "1"}),
        "chat": (CHAT, {}),
        "chat, resumable": (CHAT, {"X-Stream-Resume": "1"}),
    }
    answers = {name: Answer() for name in asked}
    async with httpx.AsyncClient(timeout=60) as client:
        async with asyncio.TaskGroup() as tasks:
            for name, (path, headers) in asked.items():
                fields = native if path == "/stream" else chat
                tasks.create_task(post(client, service.url + path, body_of(path, fields), answers[name], headers))
            for answer in answers.values():
                await answer.flowing()
            old = await service.replicas()
            target = serve.RunTarget(application(model={"source": str(other)}), name=APP, route_prefix=f"/{APP}")
            await asyncio.to_thread(serve.run_many, [target], wait_for_applications_running=False)
            for pid in old:
                os.kill(pid, signal.SIGKILL)
        for name, answer in answers.items():
            assert answer.status == 200, name
            assert answer.error is not None, name
            assert answer.error["code"] == "wrong_weights", name
            assert "the model was replaced" in answer.error["message"], name
            assert answer.choices[0]["text"], name
        await service.whole(2)
        for answer in answers.values():
            if answer.stream_id:
                deadline = time.monotonic() + 180
                while (late := await client.get(f"{service.url}/v1/streams/{answer.stream_id}")).status_code != 410:
                    assert time.monotonic() < deadline, late.text  # an ingress of the old version answers still
                    await asyncio.sleep(0.2)
                assert late.json()["error"]["code"] == "wrong_weights"
