"""How many compute threads a CPU replica takes when its config doesn't say."""

from __future__ import annotations

import os
from pathlib import Path

_TOPOLOGY = Path("/sys/devices/system/cpu")


def usable_cores(topology: Path = _TOPOLOGY) -> int:
    """Physical cores that this process may run on: two threads of one core only get in each other's way."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cores = set()
    for cpu in os.sched_getaffinity(0):
        try:
            cores.add((topology / f"cpu{cpu}/topology/thread_siblings_list").read_text().strip())
        except OSError:  # not told here (some containers): count it as a core of its own
            cores.add(str(cpu))
    return max(1, len(cores))


def default_threads(*, given_cpus: float, only_replica: bool) -> int:
    """All cores for the only replica of a deployment, else the CPUs that Ray gave this one.

    On 2 cores that also run the proxy and the ingress, 2 threads served 134 tok/s at 8 streams and 1 thread 102
    (the demo model; `python -m loadtest.bench`).
    """
    return max(int(given_cpus), usable_cores()) if only_replica else max(1, int(given_cpus))
