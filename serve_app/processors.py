"""How many CPUs this process may use, by its CPU affinity and by the quotas of its control groups.

A container sees all CPUs of its host. Imports nothing else of serve_app but `cgroups`.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

from serve_app.cgroups import CGROUPS, PROC, ControlGroup, control_groups


def usable_cpus(proc: Path = PROC, cgroups: Path = CGROUPS) -> float:
    """The CPUs, in fractions too: what the affinity or a cpuset allows, and no more than any control group's quota."""
    quotas = [quota for group in control_groups("cpu", proc, cgroups) if (quota := _quota(group)) is not None]
    return min([float(len(allowed_cpus())), *quotas])


def schedulable_cpus(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """`usable_cpus` rounded up to whole CPUs, at least 1, because Ray counts whole CPUs."""
    return max(1, math.ceil(usable_cpus(proc, cgroups)))


def allowed_cpus() -> set[int]:
    """The numbers of the CPUs that this process may run on; a cpuset limits them as `taskset` does."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _quota(group: ControlGroup) -> float | None:
    """The group's quota of CPU time per period, in CPUs; None without a limit."""
    if group.version == 2:
        quota, _, period = (group.read("cpu.max") or "max").partition(" ")
    else:
        quota, period = group.read("cpu.cfs_quota_us") or "-1", group.read("cpu.cfs_period_us") or ""
    if quota in ("max", "-1") or not period:
        return None
    return int(quota) / int(period)
