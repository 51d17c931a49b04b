"""How many CPUs may be used, as affinities and the files of control groups tell it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from serve_app.processors import schedulable_cpus, usable_cpus


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def cpus(tmp_path: Path, cgroup: str) -> float:
    write(tmp_path / "proc" / "self", cgroup=cgroup)
    return usable_cpus(tmp_path / "proc", tmp_path / "cgroups")


def test_without_control_groups_all_that_are_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert usable_cpus(tmp_path, tmp_path) == 8
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5}, raising=False)
    assert usable_cpus(tmp_path, tmp_path) == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert usable_cpus(tmp_path, tmp_path) == 5


@pytest.mark.parametrize(
    ("outer", "inner", "found"),
    [
        ("max 100000", "250000 100000", 2.5),
        ("150000 100000", "max 100000", 1.5),
        ("150000 100000", "400000 50000", 1.5),
        ("max 100000", "max 100000", 8),
        ("9900000 100000", "max 100000", 8),
    ],
)
def test_the_tightest_quota_counts_v2(tmp_path: Path, outer: str, inner: str, found: float) -> None:
    write(tmp_path / "cgroups" / "pod", cpu__max=outer)
    write(tmp_path / "cgroups" / "pod" / "box", cpu__max=inner)
    assert cpus(tmp_path, "0::/pod/box") == found


def test_a_container_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    write(tmp_path / "cgroups", cpu__max="50000 100000")
    assert cpus(tmp_path, "0::/") == 0.5
    # Version 1 tells the path on the host, of which nothing is mounted but the last folder.
    write(tmp_path / "cgroups" / "cpu,cpuacct", cpu__cfs_quota_us=300000, cpu__cfs_period_us=100000)
    assert cpus(tmp_path, "5:memory:/docker/1f\n4:cpu,cpuacct:/docker/1f") == 3


@pytest.mark.parametrize("mounted_as", ["cpu,cpuacct", "cpu"])
def test_nested_groups_v1(tmp_path: Path, mounted_as: str) -> None:
    root = tmp_path / "cgroups" / mounted_as
    write(root / "outer", cpu__cfs_quota_us=150000, cpu__cfs_period_us=100000)
    write(root / "outer" / "inner", cpu__cfs_quota_us=-1, cpu__cfs_period_us=100000)
    assert cpus(tmp_path, "4:cpu,cpuacct:/outer/inner") == 1.5


@pytest.mark.parametrize(("quota", "told"), [("20000 100000", 1), ("150000 100000", 2), ("200000 100000", 2)])
def test_ray_is_told_whole_cpus_and_never_none(tmp_path: Path, quota: str, told: int) -> None:
    write(tmp_path / "proc" / "self", cgroup="0::/")
    write(tmp_path / "cgroups", cpu__max=quota)
    assert schedulable_cpus(tmp_path / "proc", tmp_path / "cgroups") == told
