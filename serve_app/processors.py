"""How many CPUs this process may use: of those of the machine the ones that it is allowed, and their time.

A container sees all CPUs of its host. Imports no other room but `cgroups`.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

from serve_app.cgroups import CGROUPS, PROC, ControlGroup, control_groups


def usable_cpus(proc: Path = PROC, cgroups: Path = CGROUPS) -> float:
    """CPUs' worth of time: what the affinity or a cpuset allows, and no more than any control group's quota."""
    quotas = [quota for group in control_groups("cpu", proc, cgroups) if (quota := _quota(group)) is not None]
    return min([float(len(allowed_cpus())), *quotas])


def schedulable_cpus(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """The same as Ray is told it, which counts whole CPUs: a part of one counts as one."""
    return max(1, math.ceil(usable_cpus(proc, cgroups)))


def allowed_cpus() -> set[int]:
    """The numbers of the CPUs that this process may run on; a cpuset limits them as `taskset` does."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _quota(group: ControlGroup) -> float | None:
    """CPUs' worth of time in each period; None without a limit."""
    if group.version == 2:
        quota, _, period = (group.read("cpu.max") or "max").partition(" ")
    else:
        quota, period = group.read("cpu.cfs_quota_us") or "-1", group.read("cpu.cfs_period_us") or ""
    if quota in ("max", "-1") or not period:
        return None
    return int(quota) / int(period)
