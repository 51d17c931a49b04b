"""How much main memory this process may still take, so that it can refuse a model instead of being killed.

Linux grants memory that it doesn't have, and kills the process that then writes to it. Imports nothing else of
serve_app but `cgroups`.
"""

from __future__ import annotations

import os
from pathlib import Path

from serve_app.cgroups import CGROUPS, PROC, ControlGroup, control_groups


def available_memory_bytes(proc: Path = PROC, cgroups: Path = CGROUPS) -> int | None:
    """Main memory this process could still take: the least of what the machine and its control groups have left.

    None when the system doesn't tell (macOS has no counterpart in the standard library).
    """
    left = (_free_of_machine(proc), *map(_free_of_group, control_groups("memory", proc, cgroups)))
    return min((free for free in left if free is not None), default=None)


def _free_of_machine(proc: Path) -> int | None:
    try:
        lines = (proc / "meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _free_of_group(group: ControlGroup) -> int | None:
    """The limit of one control group, less what is used there and can't be dropped.

    None when it has no limit (or, in a container, isn't visible).
    """
    # Above `memory.high` the kernel kills nothing, but it slows the group's processes down.
    names = ("memory.max", "memory.high") if group.version == 2 else ("memory.limit_in_bytes",)
    limits = [int(limit) for name in names if (limit := group.read(name)) not in (None, "max")]
    used = group.read("memory.current" if group.version == 2 else "memory.usage_in_bytes")
    if used is None or not limits or min(limits) >= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        return None
    stat = dict(line.split() for line in (group.read("memory.stat") or "").splitlines())
    inactive = int(stat.get("inactive_file", stat.get("total_inactive_file", 0)))
    active = int(stat.get("active_file", stat.get("total_active_file", 0)))
    mapped = int(stat.get("file_mapped", stat.get("total_mapped_file", 0)))
    # Cached files that were read twice, as a checkpoint is, count as active. The kernel can drop them too, unless they
    # are mapped (weights in use).
    droppable = max(inactive, inactive + active - mapped)
    return max(min(limits) - int(used) + droppable, 0)
