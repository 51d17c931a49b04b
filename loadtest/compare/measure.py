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
from loadtest.compare.accounting import PeakMemory, ProcessTree
from loadtest.compare.client import Load, RequestFailed, Stream, drive
from loadtest.compare.contenders import Contender, Start
from loadtest.compare.servers import Server, ServerFailed
from loadtest.compare.workload import Cell, Reader, Set, chats, opening
from loadtest.http_load import percentile
from loadtest.service import free_port

WARM_UP_TOKENS = 16
DISTURBED_CORES = 0.2
"""A measurement is made again when other programs use more than this: two busy cores have none to spare, and OpenMP
teams that wait for a thread without a core are slower by far more than its share. An idle machine has 0.03."""
REPEATS = 2
"""Of a disturbed measurement, at most."""
PERCENTILES = (0.5, 0.95, 0.99)
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
        start = Start(place.python, place.model, Path(work), place.environments, free_port(), settings.threads, streams)
        began = time.monotonic()
        log = place.logs / f"{contender.name.replace(' ', '-').replace(',', '')}.log"
        with Server(contender.command(start), f"http://127.0.0.1:{start.port}", log) as server:
            common = {"contender": contender.name, "start_s": round(time.monotonic() - began, 1)}
            try:
                _warm_up(server, contender, streams)
            except RequestFailed as error:
                raise ServerFailed(f"{error}; its last words: {server.last_words()}") from error
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


def _warm_up(server: Server, contender: Contender, streams: int) -> None:
    """What compiles or allocates at first use does it here, alone and in a batch."""
    load = Load(server.url, contender.body, WARM_UP_TOKENS)
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
        if first := opening(cell, turn):
            cold = asyncio.run(drive(load, [first], 1))[0]
            record["cold_ttft_s"] = cold.arrivals_s[0] - cold.started_s
        with _accounted(server.tree, record), PeakMemory(server.tree) as memory:
            streams = asyncio.run(drive(load, chats(cell, turn), cell.concurrency))
    except RequestFailed as error:
        return record | {"failed": str(error)}
    return record | {"peak_memory_bytes": memory.peak_bytes} | figures(streams, settings.new_tokens)


@contextmanager
def _accounted(tree: ProcessTree, record: Record) -> Iterator[None]:
    """Note the CPU seconds that the server, this program and everything else spent meanwhile."""
    before, mine, machine, wall = tree.cpu_s(), time.process_time(), _busy_s(), time.monotonic()
    yield
    after = tree.cpu_s()
    spent = {name: round(after[name] - before.get(name, 0.0), 2) for name in after}
    record["cpu_by_process_s"] = {name: seconds for name, seconds in spent.items() if seconds >= 0.05}
    record["cpu_s"] = sum(after.values()) - sum(before.values())
    record["client_cpu_s"] = time.process_time() - mine
    record["other_cpu_s"] = max(0.0, _busy_s() - machine - record["cpu_s"] - record["client_cpu_s"])
    record["wall_s"] = time.monotonic() - wall
    record["disturbed"] = record["other_cpu_s"] > DISTURBED_CORES * record["wall_s"]


def _busy_s() -> float:
    """Seconds that the cores of this machine were not idle."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))


def figures(streams: list[Stream], new_tokens: int) -> Record:
    """Throughput and latencies of one measurement. A gap is the time between two pieces of one answer."""
    seconds = max(stream.arrivals_s[-1] for stream in streams)
    gaps = [late - early for s in streams for early, late in zip(s.arrivals_s, s.arrivals_s[1:], strict=False)]
    return {
        "tokens": len(streams) * new_tokens,
        "seconds": seconds,
        "ttft_s": sorted(stream.arrivals_s[0] - stream.started_s for stream in streams),
        "itl_s": [percentile(gaps or [0.0], share) for share in PERCENTILES],
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
