"""How much main memory a process may still take: for those who would rather refuse than be killed.

Linux promises memory that it doesn't have, and kills who then writes to it. Imports no other room.
"""

from __future__ import annotations

import os
from pathlib import Path


def available_memory_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Main memory this process could still take: the machine's and every control group's above it.

    None when the system doesn't tell (macOS has no counterpart in the standard library).
    """
    limits = [free for free in (_free_of_machine(proc), _free_of_cgroups(proc, cgroups)) if free is not None]
    return min(limits, default=None)


def _free_of_machine(proc: Path) -> int | None:
    try:
        lines = (proc / "meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _free_of_cgroups(proc: Path, cgroups: Path) -> int | None:
    """The tightest limit on the way up, less what is used there and can't be dropped (cgroup v2, then v1)."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return None
    free: list[int] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, usage = cgroups, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit, usage = cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        folder = root / path.lstrip("/")
        for group in (folder, *folder.parents):
            if (left := _left(group, limit, usage)) is not None:
                free.append(left)
            if group == root:
                break
    return min(free, default=None)


def _left(group: Path, limit_file: str, usage_file: str) -> int | None:
    """Limit less usage of one control group; None when it has no limit (or, in a container, isn't visible)."""
    try:
        limit = (group / limit_file).read_text().strip()
        used = int((group / usage_file).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    if limit == "max" or int(limit) >= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        return None
    inactive = int(stat.get("inactive_file", stat.get("total_inactive_file", 0)))
    active = int(stat.get("active_file", stat.get("total_active_file", 0)))
    mapped = int(stat.get("file_mapped", stat.get("total_mapped_file", 0)))
    # Files that were read twice, as a checkpoint is, are active, and dropped too unless they are weights in use.
    droppable = max(inactive, inactive + active - mapped)
    return max(int(limit) - used + droppable, 0)
