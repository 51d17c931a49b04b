"""A short run of the chaos harness against the real service: its own cluster, the demo model, real SIGKILLs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from loadtest.idle import PATIENCE_S
from loadtest.service import START_TIMEOUT_S, STOP_TIMEOUT_S, _name

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.ray, pytest.mark.demo]


STOPPED_S = STOP_TIMEOUT_S + 30
"""After a signal: SIGINT, SIGTERM, SIGKILL to what it had started."""


@contextmanager
def chaos(output: Path, *arguments: str) -> Iterator[psutil.Popen]:
    """`python -m loadtest.chaos`, in a cluster of its own whatever the tests around it run; ended with the block."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-m", "loadtest.chaos", "--output", str(output), *arguments]
    process = psutil.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:  # a test has failed: the harness stops its service when it is told to
            family = process.children(recursive=True)
            process.send_signal(signal.SIGTERM)
            try:
                sys.stdout.write(process.communicate(timeout=STOPPED_S)[0])
            finally:
                for left in psutil.wait_procs([*family, process], timeout=5)[1]:
                    left.kill()


def test_a_model_replica_and_an_ingress_die_and_no_answer_changes(tmp_path: Path) -> None:
    output = tmp_path / "chaos.json"
    with chaos(output, "--minutes", "0.2", "--streams", "12", "--faults", "2") as process:
        # All that the harness waits for itself, and the load; a run takes a minute.
        printed, _ = process.communicate(timeout=START_TIMEOUT_S + 2 * PATIENCE_S + 120)
    assert process.returncode == 0, printed
    figures = json.loads(output.read_text())
    assert figures["faults_by_kind"] == {"kill -9 a model replica": 1, "kill -9 an ingress replica": 1}
    assert figures["faults_asked_for"] == figures["faults_by_kind"]
    assert figures["identical"] == figures["streams"] >= 12  # more come while a late fault is still to come
    assert figures["idle"]["ok"]
    kept = figures["idle"]["kept"]
    assert min(kept["before"].values()) > 0, "journals of the streams that were asked with resume"
    assert set(kept["after"].values()) == {0}


def test_an_interrupted_run_leaves_no_process_behind(tmp_path: Path) -> None:
    with chaos(tmp_path / "chaos.json", "--minutes", "1", "--streams", "10", "--faults", "1") as process:
        deadline = time.monotonic() + 60
        while not any("raylet" in _name(child) for child in process.children(recursive=True)):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.1)
        family = process.children(recursive=True)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=STOPPED_S)
    _, alive = psutil.wait_procs(family, timeout=10)
    assert [child.pid for child in alive] == []
    assert process.returncode != 0


def test_nonsense_is_refused(tmp_path: Path) -> None:
    with chaos(tmp_path / "chaos.json", "--streams", "0") as process:
        printed, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "must be positive" in printed
