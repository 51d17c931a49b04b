"""Stop a service that `serve-app serve` started on this machine, and the Ray that it started. Streams in progress may
finish within --timeout seconds.
"""

from __future__ import annotations

import argparse
import os
import signal
import time

from serve_app.cli.command_error import CommandError
from serve_app.cli.state import RunningServer, remove_what_crashes_left, running_servers

_POLL_S = 0.1
_TERMINATE_S = 10.0  # from SIGTERM to SIGKILL: Ray's own exit takes 2 to 5 s on the 2-core machine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--port", type=int, help="the port it serves on; needed only when several run")
    parser.add_argument("--all", action="store_true", help="stop every service of this user on this machine")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds for streams to finish (default: 30)")


def run(arguments: argparse.Namespace) -> int:
    """Stop the chosen services, and wait until they have ended."""
    chosen = _choose(running_servers(), arguments.port, arguments.all)
    for server in chosen:
        print(f"stopping the service on port {server.port} (process {server.pid})")
        if not _stop(server, arguments.timeout):
            raise CommandError(f"process {server.pid} did not end; see what holds it with `ps -fp {server.pid}`")
    remove_what_crashes_left()
    print("stopped" if chosen else "nothing to stop: no service of serve-app runs here")
    return 0


def _choose(running: list[RunningServer], port: int | None, everything: bool) -> list[RunningServer]:
    ports = ", ".join(str(server.port) for server in running)
    chosen = running if port is None else [server for server in running if server.port == port]
    if port is not None and not chosen:
        raise CommandError(f"serve-app serves nothing on port {port} (ports in use by it: {ports or 'none'})")
    if len(chosen) > 1 and not everything:
        raise CommandError(f"several services run, on the ports {ports}; name one with --port, or stop all with --all")
    return chosen


def _stop(server: RunningServer, timeout_s: float) -> bool:
    for number, patience_s in (
        (signal.SIGINT, timeout_s),
        (signal.SIGTERM, _TERMINATE_S),
        (signal.SIGKILL, _TERMINATE_S),
    ):
        try:
            os.kill(server.pid, number)
        except ProcessLookupError:
            return True
        except PermissionError as error:
            raise CommandError(
                f"process {server.pid} on port {server.port} belongs to another user, who must stop it"
            ) from error
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            if server not in running_servers():
                return True
            time.sleep(_POLL_S)
    return False
