"""What a server costs: CPU time and memory of everything that descends from the process that was started.

Promises that a process counts once, also after its parent has gone, and that what ended keeps the CPU time it was last
seen with. A process that starts and ends between two looks is missed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from pathlib import PurePath

import psutil

_KILL_PATIENCE_S = 10.0
MEMORY_POLL_S = 2.0
"""Reading the proportional set size of a Ray cluster took 25 to 40 ms of CPU: this often it is 2 % of a core."""


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
    """What `memory_bytes` adds up here."""
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


class PeakMemory:
    """The largest `memory_bytes` of a tree while the context lasts: at its start, each `MEMORY_POLL_S`, at its end."""

    def __init__(self, tree: ProcessTree) -> None:
        self._tree = tree
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.peak_bytes = 0

    def __enter__(self) -> PeakMemory:
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._stop.wait(MEMORY_POLL_S):
            self._look()

    def _look(self) -> None:
        self.peak_bytes = max(self.peak_bytes, self._tree.memory_bytes())
