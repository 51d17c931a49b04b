"""What `serve deploy` with a changed config does to streams in progress: `python -m loadtest.redeploy`.

Starts a service of its own, asks for eight answers undisturbed, asks for them again, deploys a changed config while
they are written, and says what happened when. Exit status 1: an answer was cut or changed.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from loadtest.chaos import service_config
from loadtest.faults import INGRESS, MODEL, changed
from loadtest.service import ChaosService, free_port
from serve_app.client import AsyncClient, Completion

STREAMS = 8
TOKENS = 300
LOOK_S = 1.0
"""A look at the replicas costs a fifth of a second of CPU."""
BEGUN_TOKENS = 20
"""Each stream has so many when the config is deployed."""


class Clients:
    """The answers as they come, two to a question: one client with resume, one without."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.tokens = [0] * STREAMS
        self.longest_pause_s = 0.0

    async def all(self) -> list[Completion]:
        """All answers, asked for at once."""
        async with AsyncClient(self._url) as client:
            return list(await asyncio.gather(*(self._one(client, number) for number in range(STREAMS))))

    async def _one(self, client: AsyncClient, number: int) -> Completion:
        question = [{"role": "user", "content": f"Tell me a story about the number {number // 2}."}]
        documents: list[Any] = []
        asked: dict[str, Any] = {"messages": question, "max_tokens": TOKENS, "temperature": number // 2 % 2, "seed": 7}
        async with client.stream(**asked, resume=bool(number % 2)) as stream:
            heard_s = time.monotonic()
            async for document in stream:
                now_s = time.monotonic()
                if documents:
                    self.longest_pause_s = max(self.longest_pause_s, now_s - heard_s)
                heard_s = now_s
                documents.append(document)
                self.tokens[number] = len(documents)
        assert stream.done is not None
        ids = tuple(document.token_id for document in documents)
        return Completion("".join(document.generated_text for document in documents), ids, stream.done)


async def run(service: ChaosService, folder: Path) -> bool:
    """Whether every answer was the undisturbed one."""
    await service.until_ready()
    undisturbed = await Clients(service.url).all()
    before = {deployment: pids(service, deployment) for deployment in (MODEL, INGRESS)}
    clients = Clients(service.url)
    asking = asyncio.create_task(clients.all())
    while min(clients.tokens) < BEGUN_TOKENS:  # noqa: ASYNC110 - nobody tells
        await asyncio.sleep(0.05)
    began_s = time.monotonic()

    def say(what: str) -> None:
        print(f"{time.monotonic() - began_s:6.1f} s  {sum(clients.tokens):5} tokens  {what}", flush=True)

    say(f"serve deploy, with {STREAMS} streams in progress")
    await deploy(service, folder / "changed.yaml", say)
    watching = asyncio.create_task(watch(service, before, say))
    answers = await asking
    say(f"the last stream has ended; longest pause {clients.longest_pause_s:.1f} s")
    await asyncio.wait_for(watching, 120)
    same = sum(
        (answer.text, answer.token_ids, answer.done.finish_reason)
        == (reference.text, reference.token_ids, reference.done.finish_reason)
        for answer, reference in zip(answers, undisturbed, strict=True)
    )
    print(f"{same} of {STREAMS} answers are identical to the undisturbed ones")
    return same == STREAMS


async def deploy(service: ChaosService, path: Path, say: Callable[[str], None]) -> None:
    """As an operator does it. Raises `RuntimeError`."""
    config = yaml.safe_dump(changed(service.config, redeploy=True, extra_models=0))
    await asyncio.to_thread(path.write_text, config)
    process = await asyncio.create_subprocess_exec(
        str(Path(sys.executable).with_name("serve")),
        "deploy",
        "--address",
        service.dashboard_url(),
        str(path),
        env=os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": service.token},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    printed, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError(printed.decode())
    say("serve deploy has returned")


async def watch(service: ChaosService, before: dict[str, set[int]], say: Callable[[str], None]) -> None:
    """Say which replicas come and go, until none of `before` is left and the application is whole."""
    seen = dict(before)
    while True:
        for deployment, known in seen.items():
            now = await asyncio.to_thread(pids, service, deployment)
            if now != known:
                old = len(now & before[deployment])
                say(f"{deployment}: {old} of the old config and {len(now) - old} of the new one")
                seen[deployment] = now
        gone = not any(seen[deployment] & before[deployment] for deployment in seen)
        if gone and await asyncio.to_thread(service.settled):
            say("the new config is served")
            return
        await asyncio.sleep(LOOK_S)


def pids(service: ChaosService, deployment: str) -> set[int]:
    """Processes of the replicas that serve."""
    return {replica.process.pid for replica in service.replicas(deployment)}


def main() -> int:
    log = Path("loadtest/results/redeploy.log")
    port = free_port()
    config = service_config(None, port, batch_invariant=True)
    config["applications"][0]["args"]["engine"]["kv_cache_memory"] = "256MiB"  # room for all: no pause by preemption
    with ChaosService(config, port, log) as service:
        return 0 if asyncio.run(run(service, log.parent)) else 1


if __name__ == "__main__":
    sys.exit(main())
