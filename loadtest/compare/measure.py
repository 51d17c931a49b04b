"""One visit to a contender: start it, warm it up, measure every cell in every round, stop it.

Promises a record for each cell and round, or the reason why there is none; nothing is measured twice or left out in
silence.
"""

from __future__ import annotations

import asyncio
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

import serve_app
from loadtest.compare.accounting import ProcessTree
from loadtest.compare.client import Load, RequestFailed, Stream, drive
from loadtest.compare.contenders import Contender, Start
from loadtest.compare.servers import Server, ServerFailed
from loadtest.compare.workload import Cell, Chat, Reader, Set, chats, opening, pairs, strangers
from loadtest.http_load import timings
from loadtest.service import free_port

WARM_UP_TOKENS = 16
PAIR_TOKENS = 8
"""Of answers of which only the first token matters."""
DISTURBED_CORES = 0.2
"""A measurement is made again when other programs use more than this: two busy cores have none to spare, and OpenMP
teams that wait for a thread without a core are slower by far more than its share. An idle machine has 0.03."""
REPEATS = 2
"""Of a disturbed measurement, at most."""
Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Settings:
    """What holds for every contender of a comparison."""

    threads: int
    new_tokens: int
    pace: float
    """Pieces a second that a paced reader takes."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where things are."""

    python: Path
    model: Path
    environments: Path
    logs: Path
    llama_server: Path | None = None
    """One that was built elsewhere."""


def visit(
    contender: Contender,
    cells: list[Cell],
    rounds: int,
    settings: Settings,
    place: Place,
    note: Callable[[Record], None],
) -> None:
    """Give `note` a record of each cell in each round. Raises `ServerFailed` when the server does not start."""
    with tempfile.TemporaryDirectory(prefix="compare-", ignore_cleanup_errors=True) as work:
        streams = max(cell.concurrency for cell in cells)
        start = Start(
            place.python,
            place.model,
            Path(work),
            place.environments,
            free_port(),
            settings.threads,
            streams,
            place.llama_server,
        )
        began = time.monotonic()
        log = place.logs / f"{contender.name.replace(' ', '-').replace(',', '')}.log"
        command = contender.command(start)
        with Server(command, f"http://127.0.0.1:{start.port}", log) as server:
            # ray.serve.llm says that it is ready when its ingress is: the first requests wait for the model, as long
            # as a server may take that says so when it has one.
            load = Load(server.url, contender.body, WARM_UP_TOKENS, timeout_s=command.ready_timeout_s)
            try:
                warm_up(load, streams)
            except RequestFailed as error:
                raise ServerFailed(f"{error}; its last words: {server.last_words()}") from error
            common: Record = {"contender": contender.name, "start_s": round(time.monotonic() - began, 1)}
            for turn in range(rounds):
                for cell in cells:
                    for record in _undisturbed(server, contender, cell, f"round {turn}", settings):
                        note(common | record)


def _undisturbed(server: Server, contender: Contender, cell: Cell, turn: str, settings: Settings) -> Iterator[Record]:
    """Records up to the first that nobody disturbed; each asks other questions, so that no cache knows them."""
    for name in (turn, *(f"{turn}, again {repeat + 1}" for repeat in range(REPEATS))):
        record = measure(server, contender, cell, name, settings)
        yield record
        if not record.get("disturbed"):
            return


def warm_up(load: Load, streams: int) -> None:
    """What compiles or allocates at first use does it here, alone and in a batch. Raises `RequestFailed`."""
    cell = Cell(Set.VARIED, streams)
    for concurrency in (1, streams):
        asyncio.run(drive(load, chats(cell, f"warm-up {concurrency}")[:concurrency], concurrency))


def measure(server: Server, contender: Contender, cell: Cell, turn: str, settings: Settings) -> Record:
    """The record of one measurement; it has `failed` in place of figures when a request failed."""
    pace = settings.pace if cell.reader is Reader.PACED else None
    load = Load(server.url, contender.body, settings.new_tokens, pace)
    record: Record = {
        "set": cell.set,
        "concurrency": cell.concurrency,
        "reader": cell.reader,
        "turn": turn,
        "at": round(time.time(), 1),
    }
    try:
        if cell.set is Set.SHARED:
            brief = Load(server.url, contender.body, PAIR_TOKENS)
            with accounted(server.tree, alone := {}):
                record |= _alone(brief, pairs(cell, turn))
            asyncio.run(drive(brief, [opening(cell, turn)], 1))
        memory_bytes = server.tree.memory_bytes()
        with accounted(server.tree, record):
            streams = asyncio.run(drive(load, chats(cell, turn), cell.concurrency))
        record["memory_bytes"] = max(memory_bytes, server.tree.memory_bytes())
        record["peak_rss_bytes"] = server.tree.peak_rss_bytes()
        if cell.set is Set.SHARED:
            with accounted(server.tree, cold := {}):
                others = asyncio.run(drive(load, strangers(cell, turn), cell.concurrency))
            record["cold_ttft_s"] = timings(others)["ttft_s"]
            record["disturbed"] = any(part["disturbed"] for part in (alone, record, cold))
    except RequestFailed as error:
        return record | {"failed": str(error)}
    return record | figures(streams, settings.new_tokens)


def _alone(load: Load, asked: list[tuple[Chat, Chat]]) -> Record:
    """Times to first token of requests that have the server to themselves: each first with a prefix that it has never
    seen, then another question about the same prefix, so that a drift of the machine meets both kinds."""
    streams = asyncio.run(drive(load, [chat for pair in asked for chat in pair], 1))
    firsts = [stream.arrivals_s[0] - stream.started_s for stream in streams]
    return {"cold_alone_ttft_s": firsts[::2], "warm_alone_ttft_s": firsts[1::2]}


@contextmanager
def accounted(tree: ProcessTree, record: Record, beside: ProcessTree | None = None) -> Iterator[None]:
    """Note the CPU seconds that the server, this program and everything else spent meanwhile; those of `beside`, which
    is neither, apart."""
    trees = (tree,) if beside is None else (tree, beside)
    before = [each.cpu_s() for each in trees]
    mine, machine, wall = time.process_time(), _busy_s(), time.monotonic()
    yield
    record["client_cpu_s"] = time.process_time() - mine
    record["wall_s"] = time.monotonic() - wall
    busy_s = _busy_s() - machine
    after = [each.cpu_s() for each in trees]
    spent = [sum(late.values()) - sum(early.values()) for early, late in zip(before, after, strict=True)]
    record["cpu_s"] = spent[0]
    if beside is not None:
        record["beside_cpu_s"] = spent[1]
    by_process = {name: round(seconds - before[0].get(name, 0.0), 2) for name, seconds in after[0].items()}
    record["cpu_by_process_s"] = {name: seconds for name, seconds in by_process.items() if seconds}
    record["other_cpu_s"] = max(0.0, busy_s - record["client_cpu_s"] - sum(spent))
    record["disturbed"] = record["other_cpu_s"] > DISTURBED_CORES * record["wall_s"]


def _busy_s() -> float:
    """Seconds that the cores of this machine were not idle."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))


def figures(streams: list[Stream], new_tokens: int) -> Record:
    """Throughput and latencies of one measurement."""
    return timings(streams) | {
        "tokens": len(streams) * new_tokens,
        "pieces": sum(len(stream.arrivals_s) for stream in streams),
        "prompt_tokens": sum(stream.prompt_tokens for stream in streams),
        "digests": [stream.digest for stream in streams],
    }


def our_version() -> str:
    """The commit that serve_app runs from, or its version."""
    folder = Path(serve_app.__file__).parent
    described = subprocess.run(
        ["git", "-C", str(folder), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return described.stdout.strip() if described.returncode == 0 else getattr(serve_app, "__version__", "?")
