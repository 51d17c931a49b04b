"""What a server costs: CPU time and memory of everything that descends from the process that was started.

Promises that a process counts once, also after its parent has gone, and that what ended keeps the CPU time it was last
seen with. A process that starts and ends between two looks is missed. A look at the memory of a Ray cluster takes 25 to
40 ms of CPU: nobody looks while something is timed.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
from pathlib import Path, PurePath

import psutil

_KILL_PATIENCE_S = 10.0
_HIGH_WATER = re.compile(r"^VmHWM:\s+(\d+) kB", re.MULTILINE)


class ProcessTree:
    """The processes of one server, which was started in a session of its own."""

    def __init__(self, root: psutil.Process) -> None:
        self._root = root
        self._seen: dict[psutil.Process, float] = {}
        """CPU seconds at the last look."""
        self._titles: dict[psutil.Process, str] = {}

    def members(self) -> list[psutil.Process]:
        """Those that live now: the root's session, all descendants, and those of processes seen before."""
        found = {process for process in self._seen if process.is_running()}
        found |= {process for process in psutil.process_iter() if _session(process) == self._root.pid}
        if self._root.is_running():
            found.add(self._root)
        for process in list(found):
            with contextlib.suppress(psutil.NoSuchProcess):
                found.update(process.children(recursive=True))
        for process in found:
            self._seen.setdefault(process, 0.0)
        return [process for process in found if _alive(process)]

    def cpu_s(self) -> dict[str, float]:
        """User and system seconds since each process began, by title, those that have ended included."""
        for process in self.members():
            with contextlib.suppress(psutil.NoSuchProcess):
                self._titles[process] = title(process.cmdline())
                times = process.cpu_times()
                self._seen[process] = times.user + times.system
        totals: dict[str, float] = {}
        for process, seconds in self._seen.items():
            name = self._titles.get(process, "")
            totals[name] = totals.get(name, 0.0) + seconds
        return totals

    def memory_bytes(self) -> int:
        """Proportional set sizes added up: what processes share counts once. Where there are none (not Linux), RSS."""
        total = 0
        for process in self.members():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                information = process.memory_full_info() if psutil.LINUX else process.memory_info()
                total += getattr(information, "pss", information.rss)
        return total

    def peak_rss_bytes(self) -> int:
        """The largest resident set that each living process ever had, added up: what they share counts in each. Where
        the system keeps no such mark (not Linux), the resident sets of now."""
        total = 0
        for process in self.members():
            with contextlib.suppress(psutil.NoSuchProcess, OSError):
                total += _high_water_bytes(process.pid) if psutil.LINUX else process.memory_info().rss
        return total

    def kill(self) -> None:
        """SIGKILL for whatever is left, until nothing is."""
        for _ in range(3):  # what was just being started when its parent died
            left = self.members()
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
            if not psutil.wait_procs(left, timeout=_KILL_PATIENCE_S)[1] and not self.members():
                return


def memory_kind() -> str:
    """What `ProcessTree.memory_bytes` adds up here."""
    return "PSS" if psutil.LINUX else "RSS"


def title(arguments: list[str]) -> str:
    """What a process is, from its command line: Ray's titles without the method that happens to run."""
    if not arguments or not arguments[0]:
        return "?"
    first = arguments[0].split()[0]
    if first.startswith("ray::"):
        return first.split(".")[0]
    name = PurePath(first).name
    if "python" in name:
        script = arguments[2] if arguments[1:2] == ["-m"] else PurePath((arguments[1:2] or [""])[0]).name
        return f"{name} {script}".strip()
    return name


def _session(process: psutil.Process) -> int:
    try:
        return os.getsid(process.pid)
    except (ProcessLookupError, PermissionError):
        return -1


def _alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _high_water_bytes(pid: int) -> int:
    """Of one process, since it began. Raises `OSError` when it has gone; 0 for one that is just going."""
    found = _HIGH_WATER.search(Path(f"/proc/{pid}/status").read_text())
    return 1024 * int(found[1]) if found else 0
