"""Does every accepted stream end in the text it would have had, whatever dies under it (P2, P3)?

`python -m loadtest.chaos` (or `make chaos`) starts a service of its own, asks every question once undisturbed, then
again and again while a seeded schedule kills, freezes, redeploys and scales, and compares. Exit status 1: a promise was
broken, or not put to the test.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import httpx
import yaml

from loadtest import chaos_report, idle
from loadtest.chaos_client import TIMEOUT, ChaosClient
from loadtest.chaos_report import Judged, judge_outcome
from loadtest.faults import Injector
from loadtest.outcome import Outcome
from loadtest.schedule import Scheduled, plan
from loadtest.service import GRPC_SERVICES, ChaosService, derive_config, free_port
from loadtest.verdicts import LIMITED, Answer
from loadtest.workload import Kind, Mode, Question, Visit, questions, visits

BASE_CONFIG = Path("configs/serve.yaml")
RESULTS = Path("loadtest/results")
OVERRIDES: dict[str, Any] = {
    # The tools and the longest answer take about 800 tokens.
    "model": {"max_model_len": 1024},
    # Either replica can run all clients' streams when the other dies. 160 MiB are 3,640 tokens of the demo model: with
    # many streams beside each other it runs out of pages now and then.
    "engine": {"kv_cache_memory": "160MiB", "max_running": 20, "threads": 1},
    "model_server": {"num_replicas": 2, "num_cpus": 0.1, "graceful_shutdown_timeout_s": 60},
    # A stream whose model replicas die one after the other takes minutes; what drains must wait for it.
    "ingress": {"num_replicas": 2, "num_cpus": 0.1, "graceful_shutdown_timeout_s": 300},
}
"""Laid over the config's `args`: two replicas of each, small enough for a laptop. CPUs are Ray's book-keeping only: a
rolling update and a third replica must find room on two cores."""
EXPIRY_S = 60.0
"""Of journals, which must all be gone in the end. No client stays away for so long: a proxy is back within 15 s."""
DISTINCT = 60
"""Questions; more streams ask some of them again."""
IN_FLIGHT = 16
"""Clients at a time; some ask for two answers. What one replica can run: a pause after a kill is to tell of failover,
not of a queue, where streams wait for as long as others take."""
REFERENCE_IN_FLIGHT = 8
ENCORE, ENCORE_STEP_S = 90, 1.0
"""Clients that come, one each step, while faults are still to be carried out after the others have gone."""
_MOVED = re.compile(r"request (\S+), choice \d+: .*trying again")
_AGAIN = re.compile(r"request (\S+), choice \d+: continued; recomputing its tokens took ([\d.]+) s")
_TAKEN_OVER = re.compile(r"stream (\S+) is continued here")


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be run; a function of the arguments."""

    streams: int
    faults: int
    seconds: float
    seed: int
    batch_invariant: bool
    kinds: tuple[Kind, ...] = tuple(Kind)


async def run(service: ChaosService, wanted: Plan) -> dict[str, Any]:
    """The whole run against a service that is starting; its figures."""
    await service.until_ready()
    asked = questions(wanted.seed, min(DISTINCT, wanted.streams), wanted.kinds)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)  # none to a proxy that has died
    async with httpx.AsyncClient(headers=service.headers, limits=limits, timeout=TIMEOUT, trust_env=False) as http:
        began_s = time.monotonic()
        references = await undisturbed(http, service, asked)
        print(f"{len(asked)} undisturbed answers in {time.monotonic() - began_s:.0f} s", flush=True)
        before, wrong = await idle.until_idle(service, None)
        if wrong:
            raise RuntimeError(f"the service is not at rest before the first fault: {'; '.join(wrong)}")
        schedule = plan(wanted.seed, wanted.faults, wanted.seconds)
        outcomes, injector = await disturbed(http, service, asked, schedule, wanted)
    after, wrong = await idle.until_idle(service, before)
    moves = moved_requests(service.logs)
    judged = [
        judged_against(outcome, asked, references, moves, batch_invariant=wanted.batch_invariant)
        for outcome in outcomes
    ]
    asked_for = [scheduled.fault for scheduled in schedule]
    figures = chaos_report.summary(judged, injector.done, asked_for, batch_invariant=wanted.batch_invariant)
    figures["skipped_faults"] = [f"{fault}: {why}" for fault, why in injector.skipped]
    figures["proxy_outages_s"] = injector.proxy_outages_s
    figures["untested"] = chaos_report.untested(figures)
    figures["idle"] = idle.as_json(before, after, wrong)
    return figures


class Door(Protocol):
    """Where a service answers."""

    url: str
    grpc_target: str
    """`host:port`"""


async def undisturbed(http: httpx.AsyncClient, service: Door, asked: list[Question]) -> list[Answer]:
    """The answer to each question, from the same service, before anything happens to it. Raises `RuntimeError`."""
    places = asyncio.Semaphore(REFERENCE_IN_FLIGHT)

    async def one(number: int, question: Question) -> Answer:
        async with places:
            # Some with resume, so that what serves it is there when the service is counted at rest.
            mode = Mode.PLAIN if number % 3 else Mode.RESUME
            visit = Visit(number, 0.0, number, mode)
            outcome = await ChaosClient(http, service.url, question, visit, service.grpc_target).play()
        if outcome.answer is None or outcome.broken or outcome.faults:
            raise RuntimeError(f"question {number} ({question.kind}: {question.body}) failed undisturbed: {outcome}")
        if wrong := unlike_asked(question, outcome.answer):
            raise RuntimeError(f"the answer to question {number} ({question.kind}: {question.body}) {wrong}")
        return outcome.answer

    return list(await asyncio.gather(*(one(number, question) for number, question in enumerate(asked))))


def unlike_asked(question: Question, answer: Answer) -> str:
    """What is wrong with an answer that has to be JSON or tool calls and that no limit has cut; "": nothing."""
    forced = "tools" in question.body
    for index, reason in enumerate(answer.finish_reasons):
        calls = answer.calls[index]
        documents = [arguments for _, arguments in calls] if forced else [answer.texts[index]]
        if reason in LIMITED or not (forced or question.kind is Kind.STRUCTURED):
            continue
        if forced and not calls:
            return "calls no tool"
        try:
            if not all(isinstance(json.loads(document), dict) for document in documents):
                return f"is no JSON object: {documents}"
        except ValueError as error:
            return f"is no JSON ({error}): {documents}"
    return ""


async def disturbed(
    http: httpx.AsyncClient, service: ChaosService, asked: list[Question], schedule: list[Scheduled], wanted: Plan
) -> tuple[list[Outcome], Injector]:
    """The load and the faults, side by side; both over when it returns."""
    active: set[ChaosClient] = set()
    places = asyncio.Semaphore(IN_FLIGHT)
    injector = Injector(service, lambda: sum(client.cut() for client in list(active)))
    began_s = time.monotonic()

    async def one(visit: Visit) -> Outcome:
        await asyncio.sleep(max(0.0, began_s + visit.at_s - time.monotonic()))
        async with places:
            client = ChaosClient(http, service.url, asked[visit.question], visit, service.grpc_target)
            active.add(client)
            try:
                return await client.play()
            finally:
                active.discard(client)

    faults_s = [scheduled.at_s for scheduled in schedule]
    coming = visits(wanted.seed, wanted.streams, 0.95 * wanted.seconds, asked, faults_s)
    faults = asyncio.create_task(injector.run(schedule, began_s))
    try:
        outcomes = await asyncio.gather(*(one(visit) for visit in coming))
        outcomes += await _encore(faults, one, asked, wanted)
    finally:
        faults.cancel()
        await asyncio.wait({faults})
    if not faults.cancelled():
        faults.result()
    return outcomes, injector


async def _encore(
    faults: asyncio.Task[None], play: Callable[[Visit], Awaitable[Outcome]], asked: list[Question], wanted: Plan
) -> list[Outcome]:
    """A fault that waited for a replica makes all after it late: clients keep coming until the last one is over."""
    playing = []
    for visit in visits(wanted.seed + 1, ENCORE, 0.0, asked):
        if faults.done():
            break
        playing.append(asyncio.ensure_future(play(replace(visit, number=wanted.streams + visit.number))))
        await asyncio.wait({faults}, timeout=ENCORE_STEP_S)
    return list(await asyncio.gather(*playing))


@dataclass(frozen=True, slots=True)
class Moves:
    """What the ingress replicas logged of streams that they continued."""

    moved: set[str]
    """Ids of requests that were continued on another attempt, and of streams that another ingress took over."""
    again_s: dict[str, float]
    """How long it took to compute what a request had, of those that were continued once."""


def moved_requests(logs: Path) -> Moves:
    """From the logs of all ingress replicas."""
    text = "\n".join(path.read_text(errors="replace") for path in (logs / "serve").glob("replica_*_Ingress_*.log"))
    moves = Counter(_MOVED.findall(text))
    again_s = {request: float(seconds) for request, seconds in _AGAIN.findall(text) if moves[request] == 1}
    return Moves({*moves, *_TAKEN_OVER.findall(text)}, again_s)


def judged_against(
    outcome: Outcome, asked: list[Question], references: list[Answer], moves: Moves, *, batch_invariant: bool
) -> Judged:
    """One outcome against the undisturbed answer to its question."""
    number = outcome.visit.question
    ids = {*outcome.request_ids, outcome.stream_id}
    again = [moves.again_s[one] for one in ids if one in moves.again_s]
    return judge_outcome(
        outcome,
        asked[number],
        references[number],
        batch_invariant=batch_invariant,
        moved=not ids.isdisjoint(moves.moved),
        again_s=again[0] if len(again) == 1 else None,
    )


def service_config(
    path: Path | None, port: int, *, batch_invariant: bool, expiry_s: float = EXPIRY_S, grpc_port: int | None = None
) -> dict[str, Any]:
    """The config to serve: `path` as it is, or the base config made small; on loopback, exact or fast as asked.

    `grpc_port`: where it serves gRPC; None: nowhere.
    """
    config: dict[str, Any] = yaml.safe_load((path or BASE_CONFIG).read_text())
    application = config["applications"][0]
    arguments = application["args"] if path else derive_config(application["args"], OVERRIDES)
    arguments = derive_config(
        arguments,
        {
            "engine": {"batch_invariant": batch_invariant},
            "streams": {"expiry_s": expiry_s},
            "responses": {"expiry_s": expiry_s},
        },
    )
    models = arguments.setdefault("model_server", {}).setdefault("num_replicas", 1)
    application |= {"name": "serve_app", "args": arguments, "route_prefix": "/"}
    # From the first, since a deployment that has no override is not the same to Serve as one that has.
    application["deployments"] = [{"name": "ModelServer", "num_replicas": models}]
    config.pop("grpc_options", None)
    if grpc_port is not None:
        config["grpc_options"] = {"port": grpc_port, "grpc_servicer_functions": [GRPC_SERVICES]}
    return config | {"http_options": {**config.get("http_options", {}), "host": "127.0.0.1", "port": port}}


def _interrupt(*_: int | FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="of load (default: 5)")
    parser.add_argument("--streams", type=int, default=300)
    parser.add_argument("--faults", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--config", type=Path, help=f"serve this instead of a small {BASE_CONFIG} with two replicas")
    parser.add_argument(
        "--kinds", nargs="+", type=Kind, choices=list(Kind), default=list(Kind), help="of streams (default: all)"
    )
    parser.add_argument("--fast", action="store_true", help="without engine.batch_invariant: sound answers may diverge")
    parser.add_argument("--output", type=Path, default=RESULTS / "chaos.json")
    arguments = parser.parse_args()
    if arguments.streams < 1 or arguments.faults < 0 or not arguments.minutes > 0:
        parser.error("--streams and --minutes must be positive, --faults must not be negative")
    wanted = Plan(
        arguments.streams,
        arguments.faults,
        60 * arguments.minutes,
        arguments.seed,
        not arguments.fast,
        tuple(dict.fromkeys(arguments.kinds)),
    )
    port = free_port()
    signal.signal(signal.SIGTERM, _interrupt)  # the service is stopped then too
    log = arguments.output.with_suffix(".log")
    config = service_config(
        arguments.config,
        port,
        batch_invariant=wanted.batch_invariant,
        expiry_s=min(EXPIRY_S, wanted.seconds),
        grpc_port=free_port() if Kind.GRPC in wanted.kinds else None,
    )
    with ChaosService(config, port, log, asks_for_key=True) as service:
        figures = asyncio.run(run(service, wanted))
    text = chaos_report.table(figures)
    print(f"\n{text}\n")
    for failure in figures["failures"][:20]:
        who = f"visit {failure['visit']} ({failure['kind']}, {failure['mode']})"
        print(f"{who} {failure['verdict']}: {failure['why'][:600]}")
    for cut in figures["cut_without_cause"][:20]:
        print(f"cut without cause: {cut[:300]}")
    document = {"plan": vars(arguments) | {"config": str(arguments.config or ""), "output": ""}, **figures}
    arguments.output.write_text(json.dumps({**document, "table": text}, indent=1))
    print(f"written to {arguments.output}")
    return 0 if chaos_report.kept(figures) else 1


if __name__ == "__main__":
    sys.exit(main())
