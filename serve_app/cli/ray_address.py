"""The address that Ray's programs use by default: that of the cluster that was started last on this machine.

`ray start` writes it into a file and only `ray stop` removes it. A cluster that was killed leaves it behind, and
`serve run` then waits minutes for the dead cluster. Knows no Ray: it reads Ray's file and connects to the address.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Mapping
from pathlib import Path

_ANSWERS_WITHIN_S = 2.0
"""Time for a TCP connection; a cluster in the same network takes milliseconds."""


def address_file(environment: Mapping[str, str]) -> Path:
    """Where Ray notes the address, whether or not anything is noted."""
    places = [environment.get("RAY_TMPDIR"), environment.get("TMPDIR") if sys.platform == "linux" else None, "/tmp"]
    return Path(next(place for place in places if place), "ray", "ray_current_cluster")


def stale_address(environment: Mapping[str, str]) -> str | None:
    """What to tell the user when the noted cluster does not answer; None when it does, or when none is noted."""
    file = address_file(environment)
    try:
        address = file.read_text(encoding="utf-8").strip()
    except OSError:
        return None
    if answers(address):
        return None
    return (
        f"{file} names a Ray cluster that does not answer any more ({address}), and `serve run` would wait minutes for "
        f"it; remove it with `rm {file}`"
    )


def answers(address: str) -> bool:
    """Whether anything listens at `host:port`."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWERS_WITHIN_S).close()
    except (OSError, ValueError):
        return False
    return True
