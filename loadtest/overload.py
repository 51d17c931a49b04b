"""What a service does at ten times its capacity: what it refuses and how fast, what it finishes and when.

    python -m loadtest.overload                       # starts configs/serve.yaml; three minutes a phase
    python -m loadtest.overload --seconds 60 --burst 400
    python -m loadtest.overload --url http://127.0.0.1:8000

Three phases in one run, of the same streamed chats: as many clients as there are places, each with one chat at a time
(the capacity); chats that come at random moments, `--times` as many as that; and `--burst` chats at once. Prints a line
for each and writes JSON. Goodput is the tokens of chats that were answered to their end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from loadtest.http_load import percentile
from loadtest.local_service import LocalService
from loadtest.service import derive_config, free_port
from loadtest.stalls import Stalls

PLACES = 32
"""`engine.max_running` of the configs."""
MAX_TOKENS = 64
SUBJECTS = "the tides", "binary search", "a bicycle's gears", "photosynthesis", "a haiku", "prime numbers", "vaccines"
WAITED_S = 5.0
"""A refusal that takes longer came after a wait: `admission.max_wait_s` is 10 s. Others were decided at once."""
RESULTS = Path(__file__).parent / "results" / "overload.json"
PATIENCE_S = 120.0
"""A client gives up after so long: then something is wrong."""


@dataclass(slots=True)
class Outcome:
    """One chat as its client saw it, in seconds from when it was sent."""

    status: int = 0
    """0: the connection failed."""
    began: float = 0.0
    """By `time.perf_counter`."""
    first_s: float | None = None
    """Of its first token."""
    ended_s: float = 0.0
    tokens: int = 0
    finished: bool = False
    retry_after_s: float | None = None


async def chat(http: aiohttp.ClientSession, url: str, question: str) -> Outcome:
    """Ask for a streamed chat of `MAX_TOKENS` tokens."""
    began = time.perf_counter()
    outcome = Outcome(began=began)
    body = {
        "messages": [{"role": "user", "content": question}],
        "max_tokens": MAX_TOKENS,
        "ignore_eos": True,
        "stream": True,
    }
    with contextlib.suppress(aiohttp.ClientError, TimeoutError):
        async with http.post(f"{url}/v1/chat/completions", json=body) as response:
            outcome.status = response.status
            if response.status == 200:
                await _read(response, outcome, began)
            else:
                await response.read()
                outcome.retry_after_s = float(response.headers.get("retry-after", "nan"))
    outcome.ended_s = time.perf_counter() - began
    return outcome


async def _read(response: aiohttp.ClientResponse, outcome: Outcome, began: float) -> None:
    async for line in response.content:
        if not line.startswith(b"data: {"):
            continue
        for choice in json.loads(line[6:]).get("choices", ()):
            if choice["delta"].get("content"):
                outcome.tokens += 1
                outcome.first_s = outcome.first_s or time.perf_counter() - began
            outcome.finished = outcome.finished or choice["finish_reason"] is not None


class Crowd:
    """The clients of a run."""

    def __init__(self, url: str, seed: int, headers: dict[str, str] | None = None) -> None:
        """Use it where an event loop runs."""
        self._url = url
        self._random = random.Random(seed)
        # Not httpx, which takes several times as long for a request: the clients share the cores with the service.
        self._http = aiohttp.ClientSession(
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=PATIENCE_S),
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
        )

    async def aclose(self) -> None:
        await self._http.close()

    async def steady(self, seconds: float, clients: int = PLACES) -> list[Outcome]:
        """Each client asks again as soon as it has its answer. Those that began in time are waited for."""
        end, outcomes = time.perf_counter() + seconds, []

        async def one() -> None:
            while time.perf_counter() < end:
                outcomes.append(await self._ask())

        await asyncio.gather(*(one() for _ in range(clients)))
        return outcomes

    async def at_random(self, seconds: float, per_s: float) -> list[Outcome]:
        """Chats that come whether earlier ones are answered or not."""
        end, asked = time.perf_counter() + seconds, []
        due = time.perf_counter()
        while (due := due + self._random.expovariate(per_s)) < end:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            asked.append(asyncio.create_task(self._ask()))
        return await asyncio.gather(*asked)

    async def at_once(self, number: int) -> list[Outcome]:
        return await asyncio.gather(*(self._ask() for _ in range(number)))

    async def _ask(self) -> Outcome:
        number = self._random.randrange(10**6)
        subject = SUBJECTS[number % len(SUBJECTS)]
        return await chat(self._http, self._url, f"Question {number}: what should everybody know about {subject}?")


def summary(outcomes: Sequence[Outcome], seconds: float, stalls: Stalls | None = None) -> dict[str, Any]:
    """What is told of a phase that took `seconds`. `stalls`: when the clients themselves stood still."""
    stalls = stalls or Stalls()
    refused = [one for one in outcomes if one.status in (429, 503)]
    begun = [one for one in outcomes if one.first_s is not None]
    late = [one for one in refused if one.ended_s >= WAITED_S]
    soon = [(one.began, one.ended_s) for one in refused if one.ended_s < WAITED_S]
    starts = [(one.began, one.first_s) for one in begun if one.first_s is not None]
    return {
        "seconds": seconds,
        "asked": len(outcomes),
        "finished": sum(one.finished for one in outcomes),
        "lost": sum(one.status == 200 and not one.finished for one in outcomes),
        "statuses": dict(Counter(str(one.status) for one in outcomes)),
        "goodput_tokens_per_s": sum(one.tokens for one in outcomes if one.finished) / seconds,
        "refused": len(refused),
        "refused_after_a_wait": len(late),
        "refusal_s": _percentiles([took_s for _, took_s in soon]),
        "refusal_less_stalls_s": _percentiles([took_s - stalls.within_s(at, at + took_s) for at, took_s in soon]),
        "first_token_s": _percentiles([took_s for _, took_s in starts]),
        "first_token_less_stalls_s": _percentiles([took_s - stalls.within_s(at, at + took_s) for at, took_s in starts]),
        "last_first_token_s": max((took_s for _, took_s in starts), default=None),
        "retry_after_s": _percentiles([one.retry_after_s for one in refused if one.retry_after_s is not None]),
    }


def _percentiles(values: list[float]) -> dict[str, float]:
    return {f"p{share * 100:g}": percentile(values, share) for share in (0.5, 0.99)} if values else {}


async def measure(url: str, seconds: float, times: float, burst: int, seed: int) -> dict[str, Any]:
    """All phases, one after the other."""
    crowd = Crowd(url, seed)
    phases: dict[str, Any] = {}

    async def phase(name: str, title: str, work: Awaitable[list[Outcome]]) -> dict[str, Any]:
        began = time.perf_counter()
        async with Stalls() as stalls:
            outcomes = await work
        phases[name] = told = summary(outcomes, time.perf_counter() - began, stalls)
        _say(title, told)
        return told

    try:
        await crowd.steady(10.0)  # the service learns how fast it is
        capacity = await phase("capacity", "capacity", crowd.steady(seconds))
        per_s = times * capacity["finished"] / capacity["seconds"]
        overload = await phase("overload", f"{times:g} times capacity", crowd.at_random(seconds, per_s))
        phases["goodput_ratio"] = overload["goodput_tokens_per_s"] / capacity["goodput_tokens_per_s"]
        print(f"goodput: {phases['goodput_ratio']:.2f} of that at capacity", flush=True)
        if burst:
            await phase("burst", f"{burst} at once", crowd.at_once(burst))
    finally:
        await crowd.aclose()
    return phases


def _say(name: str, told: dict[str, Any]) -> None:
    def shown(values: dict[str, float], unit_s: float, unit: str) -> str:
        return " / ".join(f"{value / unit_s:.3g}" for value in values.values()) + f" {unit}" if values else "-"

    last = told["last_first_token_s"]
    print(
        f"{name}: {told['asked']} asked, {told['finished']} finished, {told['lost']} lost, {told['refused']} refused "
        f"({told['refused_after_a_wait']} after a wait); {told['goodput_tokens_per_s']:.0f} tokens/s; p50 / p99 of "
        f"refusals {shown(told['refusal_s'], 0.001, 'ms')}, of first tokens {shown(told['first_token_s'], 1, 's')}; "
        "less the time in which the clients' own process stood still "
        f"{shown(told['refusal_less_stalls_s'], 0.001, 'ms')} and {shown(told['first_token_less_stalls_s'], 1, 's')}; "
        f"the last after {'-' if last is None else f'{last:.1f} s'}; statuses {told['statuses']}",
        flush=True,
    )


@contextlib.contextmanager
def _service(options: argparse.Namespace) -> Iterator[str]:
    """The URL of the service to be measured; started here unless `--url` names one."""
    if options.url:
        yield options.url
        return
    port = options.port or free_port()
    config = derive_config(yaml.safe_load(options.config.read_text()), {"http_options": {"port": port}})
    config.pop("grpc_options", None)
    path = RESULTS.parent / "overload.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    command = [sys.executable, "-m", "serve_app.cli.main", "serve", str(path)]
    with LocalService(command, port, RESULTS.with_suffix(".log"), {}) as service:
        service.until_answers("/ready")
        yield service.url


def main() -> None:
    """Run all phases and write what they gave."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/serve.yaml"))
    parser.add_argument("--url", default="", help="of a service that runs already")
    parser.add_argument("--port", type=int, default=0, help="of the service that is started")
    parser.add_argument("--seconds", type=float, default=180.0, help="of each phase")
    parser.add_argument("--times", type=float, default=10.0, help="how many times its capacity")
    parser.add_argument("--burst", type=int, default=400, help="chats at once in the end; 0: none")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    with _service(options) as url:
        phases = asyncio.run(measure(url, options.seconds, options.times, options.burst, options.seed))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(phases, indent=1))


if __name__ == "__main__":
    main()
