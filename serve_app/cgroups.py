"""The control groups (cgroups) that this process is in, as far up the hierarchy as a container can see.

Reads versions 1 and 2. Imports nothing else of serve_app.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class ControlGroup:
    """The folder of one group's files, whose names depend on the version."""

    version: int
    folder: Path

    def read(self, name: str) -> str | None:
        """A file's text, stripped; None if it can't be read, as for a group that is not visible in a container."""
        try:
            return (self.folder / name).read_text().strip()
        except OSError:
            return None


def control_groups(controller: str, proc: Path = PROC, cgroups: Path = CGROUPS) -> Iterator[ControlGroup]:
    """The process's own group for `controller` (`cpu`, `memory`), and all above it: each may have a limit."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, version = cgroups, 2
        elif controller in controllers.split(","):
            # Controllers that share a hierarchy are mounted under their joined names (`cpu,cpuacct`) or under one.
            together = cgroups / controllers
            root, version = together if together.is_dir() else cgroups / controller, 1
        else:
            continue
        folder = root / path.lstrip("/")
        for group in (folder, *folder.parents):
            yield ControlGroup(version, group)
            if group == root:
                break
