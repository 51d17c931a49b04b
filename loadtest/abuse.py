"""What do bad clients do to good ones? `python -m loadtest.abuse` starts a service of its own on loopback.

The service asks for keys: the good clients are one tenant, the bad ones another. Good clients ask for short chats, one
after the other, first alone and then beside each attack of `loadtest.attacks`; `--rounds` repeats all attacks. Exit
status 1: a good client lost an answer, a server died, a guessed key was let in, an attempt got a 5xx other than 503,
something was left over, or a process has grown since the first round.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

from loadtest import idle
from loadtest.attacks import ATTACKS, Target, chat
from loadtest.chaos import service_config
from loadtest.faults import INGRESS, MODEL
from loadtest.http_load import percentile
from loadtest.service import ChaosService, derive_config, free_port

GOOD_CLIENTS = 2
"""Each asks for the next chat when the last one has ended."""
GUESSING = "key guessing"
REFUSED = (429, 503)
OVERRIDES: dict[str, Any] = {"model_server": {"num_replicas": 1}, "ingress": {"num_replicas": 1}}
MOST_GROWTH = 1.05
"""Memory after the last round, over that after the first one."""
SMALL_IDLE_FACTOR = 1.2
"""Idle sockets may make the first token of others so many times as late, at the 99th percentile."""


@dataclass(slots=True)
class Good:
    """What the good clients saw during one phase."""

    first_token_s: list[float] = field(default_factory=list)
    refused: int = 0
    """Answers that said when to come back."""
    lost: list[str] = field(default_factory=list)

    def p99_s(self) -> float:
        return percentile(self.first_token_s, 0.99) if self.first_token_s else float("inf")


@dataclass(slots=True)
class Phase:
    """One attack, and what it did."""

    name: str
    attempts: dict[str, int]
    good: Good
    broke: list[str]
    """Promises that were broken, in words."""


async def good_client(http: httpx.AsyncClient, url: str, found: Good, stop: asyncio.Event, number: int) -> None:
    """Short chats, one after the other, until `stop`."""
    while not stop.is_set():
        number += 1
        began = time.perf_counter()
        try:
            body = chat(f"Name a color, please ({number}).", stream=True, max_tokens=8)
            async with http.stream("POST", f"{url}/v1/chat/completions", content=body) as response:
                if response.status_code in REFUSED and "retry-after" in response.headers:
                    found.refused += 1
                    await asyncio.sleep(min(2.0, float(response.headers["retry-after"])))
                    continue
                text = first = ""
                async for line in response.aiter_lines():
                    if not first and '"content":' in line:
                        first = line
                        found.first_token_s.append(time.perf_counter() - began)
                    text += line
            if response.status_code != 200 or "[DONE]" not in text:
                found.lost.append(f"{response.status_code}: {text[:200]}")
        except httpx.HTTPError as error:
            found.lost.append(f"{type(error).__name__}: {error}")


async def phase(name: str, service: ChaosService, seconds: float, seed: int) -> Phase:
    """The good clients for so long, beside the attack of this name; none: alone."""
    good, stop = Good(), asyncio.Event()
    loop = asyncio.get_running_loop()
    chance = random.Random(f"{name} {seed}")
    target = Target("127.0.0.1", service.port, loop.time() + seconds, chance, service.other_headers)
    before = pids(service)
    async with httpx.AsyncClient(headers=service.headers, timeout=120, trust_env=False) as http:
        clients = [
            asyncio.create_task(good_client(http, service.url, good, stop, 1000 * number))
            for number in range(GOOD_CLIENTS)
        ]
        attack = ATTACKS.get(name)
        if attack is not None:
            await attack(target)
        await asyncio.sleep(max(0.0, target.end_s - loop.time()) if attack is None else 0.0)
        stop.set()
        await asyncio.gather(*clients)
    broke = [f"a good client lost an answer: {why}" for why in good.lost]
    broke += [f"{pid} of {what} died" for what, was in before.items() for pid in was - pids(service)[what]]
    broke += [
        f"{count} answers {status}" for status, count in target.seen.items() if status[:1] == "5" and status != "503"
    ]
    if name == GUESSING and (right := target.seen["200"]):
        broke.append(f"{right} guessed keys were let in")
    return Phase(name, dict(target.seen), good, broke)


def pids(service: ChaosService) -> dict[str, set[int]]:
    """Processes that must outlive every attack."""
    there = {name: {one.process.pid for one in service.replicas(name)} for name in (MODEL, INGRESS)}
    return there | {"the proxy": {process.pid for process in service.proxies()}}


def memory(service: ChaosService) -> dict[str, float]:
    """MB of resident memory of the largest process of each kind."""
    kinds = {name: [one.process for one in service.replicas(name)] for name in (MODEL, INGRESS)}
    kinds["proxy"] = service.proxies()
    return {
        kind: round(max((process.memory_info().rss for process in of), default=0) / 1e6, 1)
        for kind, of in kinds.items()
    }


async def run(service: ChaosService, names: list[str], seconds: float, seed: int, rounds: int = 1) -> dict[str, Any]:
    """All attacks, one after the other, each after a calm phase of its own."""
    await service.until_ready()
    await phase("warm-up", service, 3, seed)
    before, wrong = await idle.until_idle(service, None)
    if wrong:
        raise RuntimeError(f"the service is not at rest before the first attack: {'; '.join(wrong)}")
    used, phases, broke = [memory(service)], [], []
    for number in range(rounds):
        for name in names:
            calm = await phase("calm", service, seconds / 2, seed + number)
            found = await phase(name, service, seconds, seed + number)
            if name == "idle sockets" and found.good.p99_s() > SMALL_IDLE_FACTOR * calm.good.p99_s():
                allowed_s = SMALL_IDLE_FACTOR * calm.good.p99_s()
                found.broke.append(f"first token p99 {found.good.p99_s():.2f} s, {allowed_s:.2f} s allowed")
            phases.append((calm, found))
            broke += [f"{name}: {why}" for why in (*calm.broke, *found.broke)]
            print(line(calm, found), flush=True)
        used.append(memory(service))
    after, wrong = await idle.until_idle(service, before)
    return {
        "phases": [{"calm": asdict(calm), "attack": asdict(found)} for calm, found in phases],
        "memory_mb": used,
        "idle": idle.as_json(before, after, wrong),
        "broke": broke + growth(used[1], used[-1]) + wrong,
    }


def growth(first: dict[str, float], last: dict[str, float]) -> list[str]:
    """Which kinds of process have grown, in words."""
    return [
        f"{kind} has {last[kind]} MB, {size} MB after the first round"
        for kind, size in first.items()
        if last[kind] > MOST_GROWTH * size
    ]


HEAD = (
    "| attack | how its attempts ended | good answers | refused | first token p50, p99: calm | beside the attack |\n"
    "|---|---|---|---|---|---|"
)


def line(calm: Phase, found: Phase) -> str:
    """A row of the table."""
    ended = ", ".join(f"{count} {what[:40]}" for what, count in Counter(found.attempts).most_common(6))
    return (
        f"| {found.name} | {ended} | {len(found.good.first_token_s)} | {found.good.refused} "
        f"| {_times(calm.good)} | {_times(found.good)} |"
    )


def _times(good: Good) -> str:
    if not good.first_token_s:
        return "none"
    return f"{percentile(good.first_token_s, 0.5):.2f}, {good.p99_s():.2f} s"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attacks", nargs="+", choices=list(ATTACKS), default=list(ATTACKS), metavar="ATTACK")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each attack")
    parser.add_argument("--rounds", type=int, default=1, help="all attacks so many times (default: 1)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--config", type=Path, help="serve this instead of configs/serve.yaml")
    parser.add_argument("--output", type=Path, default=Path("loadtest/results/abuse.json"))
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    port = free_port()
    config = service_config(arguments.config, port, batch_invariant=False)
    application = config["applications"][0]
    application["args"] = derive_config(application["args"], OVERRIDES)
    application["deployments"] = [{"name": MODEL, "num_replicas": 1}]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the service is stopped then too
    with ChaosService(config, port, arguments.output.with_suffix(".log"), asks_for_key=True) as service:
        print(HEAD)
        figures = asyncio.run(run(service, arguments.attacks, arguments.seconds, arguments.seed, arguments.rounds))
    arguments.output.write_text(json.dumps(figures, indent=1))
    print("\nmemory in MB before the first round and after each:", *figures["memory_mb"], sep="\n  ")
    print(f"written to {arguments.output}")
    for why in figures["broke"][:30]:
        print(f"broken: {why[:300]}")
    return 1 if figures["broke"] else 0


if __name__ == "__main__":
    sys.exit(main())
