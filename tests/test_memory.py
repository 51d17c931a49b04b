"""What a machine and its control groups leave, as their files tell it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from serve_app.memory import available_memory_bytes


def _write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def _machine(tmp_path: Path, cgroup: str, available_kib: int = 8_000_000) -> Path:
    _write(tmp_path / "proc", meminfo=f"MemTotal: 9000000 kB\nMemAvailable: {available_kib} kB")
    _write(tmp_path / "proc" / "self", cgroup=cgroup)
    return tmp_path / "proc"


def test_memory_of_the_machine(tmp_path: Path) -> None:
    proc = _machine(tmp_path, "0::/")
    assert available_memory_bytes(proc, tmp_path / "cgroups") == 8_000_000 * 1024


def test_the_tightest_control_group_counts_v2(tmp_path: Path) -> None:
    proc = _machine(tmp_path, "0::/pod/box")
    root = tmp_path / "cgroups"
    _write(root / "pod", memory__max=1_000_000, memory__current=700_000, memory__stat="anon 1\ninactive_file 50000")
    _write(root / "pod" / "box", memory__max="max", memory__current=1, memory__stat="anon 1")
    assert available_memory_bytes(proc, root) == 350_000


def test_where_everything_is_slowed_down_is_a_limit_too(tmp_path: Path) -> None:
    proc = _machine(tmp_path, "0::/")
    _write(tmp_path / "cgroups", memory__max=1_000_000, memory__high=600_000, memory__current=100_000)
    assert available_memory_bytes(proc, tmp_path / "cgroups") == 500_000, "without memory.stat nothing can be dropped"


@pytest.mark.parametrize(("mapped", "left"), [(0, 380_000), (60_000, 320_000), (90_000, 310_000)])
def test_files_that_were_read_leave_room_unless_they_are_mapped(tmp_path: Path, mapped: int, left: int) -> None:
    proc = _machine(tmp_path, "0::/")
    stat = f"anon 1\ninactive_file 10000\nactive_file 70000\nfile_mapped {mapped}"
    _write(tmp_path / "cgroups", memory__max=1_000_000, memory__current=700_000, memory__stat=stat)
    assert available_memory_bytes(proc, tmp_path / "cgroups") == left


def test_control_group_v1_and_one_without_a_limit(tmp_path: Path) -> None:
    proc = _machine(tmp_path, "5:cpu:/x\n4:memory:/box")
    group = tmp_path / "cgroups" / "memory" / "box"
    stat = "total_inactive_file 10"
    _write(group, memory__limit_in_bytes=5000, memory__usage_in_bytes=1000, memory__stat=stat)
    assert available_memory_bytes(proc, tmp_path / "cgroups") == 4010
    _write(group, memory__limit_in_bytes=2**63 - 4096)
    assert available_memory_bytes(proc, tmp_path / "cgroups") == 8_000_000 * 1024


def test_a_system_that_does_not_tell(tmp_path: Path) -> None:
    assert available_memory_bytes(tmp_path / "none", tmp_path / "none") is None


@pytest.mark.skipif(not os.path.exists("/proc/meminfo"), reason="Linux")
def test_this_machine() -> None:
    available = available_memory_bytes()
    assert available is not None
    assert 0 < available <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
