"""The default number of compute threads of a CPU replica."""

from __future__ import annotations

from pathlib import Path

from serve_app.processors import allowed_cpus, usable_cpus

_TOPOLOGY = Path("/sys/devices/system/cpu")


def usable_cores() -> int:
    """Physical cores that this process may use, since two compute threads on one core slow each other down.

    A container's share of CPU time is rounded down: with one thread more, all threads stop when the share is used up.
    """
    cores = set()
    for cpu in allowed_cpus():
        try:
            cores.add((_TOPOLOGY / f"cpu{cpu}/topology/thread_siblings_list").read_text().strip())
        except OSError:  # some containers hide the topology: count the CPU as a core of its own
            cores.add(str(cpu))
    return max(1, min(len(cores), int(usable_cpus())))


def default_threads(*, given_cpus: float, only_replica: bool) -> int:
    """All cores for the only replica of a deployment, else the CPUs that Ray gave this one; no more than it may use.

    On 2 cores that also run the proxy and the ingress, 2 threads served 134 tok/s at 8 streams and 1 thread 102
    (the demo model; `python -m loadtest.bench`).
    """
    given = int(min(given_cpus, usable_cpus()))
    return max(given, usable_cores()) if only_replica else max(1, given)
