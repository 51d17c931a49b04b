"""Threads by default: cores, not hardware threads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from serve_app.engine.cpu.threads import default_threads, usable_cores


def test_hardware_threads_of_one_core_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    for cpu, siblings in enumerate(("0,2", "1,3", "0,2")):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{siblings}\n")
    monkeypatch.setattr("serve_app.engine.cpu.threads.usable_cpus", lambda: 4.0)
    monkeypatch.setattr("serve_app.engine.cpu.threads._TOPOLOGY", tmp_path)
    assert usable_cores() == 3, "two cores, and one that says nothing of itself"


def test_the_only_replica_takes_the_machine_and_one_of_several_what_it_was_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("serve_app.engine.cpu.threads.usable_cores", lambda: 6)
    monkeypatch.setattr("serve_app.engine.cpu.threads.usable_cpus", lambda: 12.0)
    assert default_threads(given_cpus=1, only_replica=True) == 6
    assert default_threads(given_cpus=8, only_replica=True) == 8
    assert default_threads(given_cpus=3, only_replica=False) == 3
    assert default_threads(given_cpus=0.5, only_replica=False) == 1


@pytest.mark.parametrize(("share", "threads"), [(0.5, 1), (1.9, 1), (3.0, 3), (64.0, 4)])
def test_a_containers_share_of_cpu_time_bounds_them(
    share: float, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr("serve_app.engine.cpu.threads.usable_cpus", lambda: share)
    monkeypatch.setattr("serve_app.engine.cpu.threads._TOPOLOGY", tmp_path)
    assert usable_cores() == threads
    assert default_threads(given_cpus=1, only_replica=True) == threads
    assert default_threads(given_cpus=8, only_replica=False) == max(1, min(8, int(share)))
