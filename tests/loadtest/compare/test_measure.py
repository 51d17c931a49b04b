"""One measurement: what is timed, what is read before and after it, and what a shared set measures beside it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_openai_server
import psutil
import pytest

from loadtest.compare import measure
from loadtest.compare.accounting import ProcessTree
from loadtest.compare.client import Load
from loadtest.compare.contenders import Contender, Start
from loadtest.compare.measure import Place, Settings, accounted, visit
from loadtest.compare.servers import Command, Server, ServerFailed
from loadtest.compare.workload import PAIRS, Cell, Set
from loadtest.service import free_port

SILENT = """
import sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def do_POST(self):
        time.sleep(600)
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
"""A server that says that it is ready, and lets requests wait for ever."""
BUSY_S = 0.3
BUSY = f"""
import sys, time
for line in sys.stdin:
    end = time.process_time() + {BUSY_S}
    while time.process_time() < end:
        pass
    print("done", flush=True)
"""
"""Computes for a moment for each line that it reads."""
SETTINGS = Settings(threads=1, new_tokens=5, pace=10.0)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port = free_port()
    command = Command([sys.executable, str(Path(fake_openai_server.__file__)), str(port)], {}, "/health", 30)
    with Server(command, f"http://127.0.0.1:{port}", tmp_path_factory.mktemp("log") / "log") as server:
        yield server


def one(server: Server, cell: Cell) -> dict[str, Any]:
    nobody = Contender("fake", lambda start: Command([], {}, "/health", 1))
    return measure.measure(server, nobody, cell, "round 0", SETTINGS)


def test_memory_is_not_looked_at_while_something_is_timed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    @contextmanager
    def noted(tree: ProcessTree, record: dict[str, Any]) -> Iterator[None]:
        seen.append("begin")
        with accounted(tree, record):
            yield
        seen.append("end")

    for name in ("memory_bytes", "peak_rss_bytes"):
        monkeypatch.setattr(ProcessTree, name, lambda self, name=name: seen.append(name) or len(seen))
    monkeypatch.setattr(measure, "accounted", noted)
    record = one(server, Cell(Set.VARIED, 2))
    assert seen == ["memory_bytes", "begin", "end", "memory_bytes", "peak_rss_bytes"]
    assert (record["memory_bytes"], record["peak_rss_bytes"]) == (4, 5)
    assert record["wall_s"] >= record["seconds"]
    assert "cold_ttft_s" not in record


def test_a_shared_set_is_asked_cold_and_warm_with_as_many_at_a_time(server: Server) -> None:
    record = one(server, Cell(Set.SHARED, 4))
    assert len(record["cold_alone_ttft_s"]) == len(record["warm_alone_ttft_s"]) == PAIRS >= 5
    assert len(record["cold_ttft_s"]) == len(record["ttft_s"]) == 4
    assert record["tokens"] == 20


def test_a_shared_set_is_disturbed_when_its_cold_part_is(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = iter([False, False, True])

    @contextmanager
    def disturbing(tree: ProcessTree, record: dict[str, Any]) -> Iterator[None]:
        yield
        record["disturbed"] = next(parts)

    monkeypatch.setattr(measure, "accounted", disturbing)
    assert one(server, Cell(Set.SHARED, 2))["disturbed"]


def test_cpu_time_is_the_trees_the_others_beside_it_and_everybody_elses(server: Server) -> None:
    command = [sys.executable, "-c", BUSY]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None

        def compute() -> None:
            other.stdin.write("again\n")
            other.stdin.flush()
            assert other.stdout.readline() == "done\n"

        compute()  # once it has, it has started
        with accounted(server.tree, record := {}, beside=ProcessTree(psutil.Process(other.pid))):
            compute()
            end = time.process_time() + BUSY_S
            while time.process_time() < end:
                pass
        other.stdin.close()
    # The other's in hundredths of a second; the server, whose child computes 0.1 s when it starts, does nothing.
    assert record["cpu_s"] < 0.25 < record["beside_cpu_s"] < 0.45
    assert BUSY_S <= record["client_cpu_s"] < 2 * BUSY_S
    assert record["other_cpu_s"] >= 0


def test_a_server_that_says_it_is_ready_and_never_answers_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(start: Start) -> Command:
        return Command([sys.executable, "-c", SILENT, str(start.port)], {}, "/", 30)

    def warm_up(load: Load, streams: int) -> None:
        assert load.timeout_s == 30, "as long as it may take to start"
        real_warm_up(replace(load, timeout_s=1), streams)

    real_warm_up = measure.warm_up
    monkeypatch.setattr(measure, "warm_up", warm_up)
    place = Place(Path(sys.executable), tmp_path, tmp_path, tmp_path)
    with pytest.raises(ServerFailed, match="TimeoutError"):
        visit(Contender("silent", command), [Cell(Set.VARIED, 1)], 1, SETTINGS, place, lambda record: None)
