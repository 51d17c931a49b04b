"""Start the service from a config file with `serve run`, show how far it is, and say when it is ready. Ctrl-C stops it,
and the Ray that it started.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any, Self

import yaml

from serve_app.api.http.guard import PROBE_SECRET
from serve_app.cli import announce
from serve_app.cli.access import probe_environment
from serve_app.cli.check import shortages
from serve_app.cli.command_error import CommandError
from serve_app.cli.config_file import DEFAULT_GRPC_PORT, DEFAULT_PORT, LAST_PORT, ConfigFile, load
from serve_app.cli.environment import own_cluster, ray_cpus, server_environment
from serve_app.cli.haproxy import ENABLE as HA_PROXY
from serve_app.cli.haproxy import haproxy_environment, wanted_haproxy
from serve_app.cli.haproxy_standin import ENDED
from serve_app.cli.private_folder import private_folder
from serve_app.cli.ray_address import answers, stale_address
from serve_app.cli.ray_folder import ray_folder
from serve_app.cli.ray_token import ALLOW_OPEN, cluster_token, own_token
from serve_app.cli.state import claim, remove_what_crashes_left, state_directory
from serve_app.client import AuthenticationError, Client, Readiness, ServeAppError
from serve_app.client.protocol import KEY_VARIABLE
from serve_app.demo_config import DEMO_CONFIG
from serve_app.processors import schedulable_cpus

SERVE_RUN = (sys.executable, "-m", "ray.serve.scripts", "run")
"""`serve run`, of this very environment, whatever PATH holds."""
ADD_SERVICES = "serve_app.api.grpc.services.add_services"
"""What a config names in `grpc_options.grpc_servicer_functions`."""
_POLL_S = 0.5
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("config", nargs="?", default=DEMO_CONFIG, help=f"default: the demo's, {DEMO_CONFIG}")
    parser.add_argument("--port", type=int, help="serve on this port in place of the config's")
    parser.add_argument("--grpc-port", type=int, help="serve gRPC on this port in place of the config's (0: no gRPC)")
    parser.add_argument("--host", help="listen on this address in place of the config's (0.0.0.0: on all)")
    parser.add_argument(ALLOW_OPEN, action="store_true", help="serve on a Ray cluster that asks for no token")


def run(arguments: argparse.Namespace) -> int:
    """Validate, fetch, start, and stay until the service ends."""
    file = load(Path(arguments.config))
    host = arguments.host if arguments.host is not None else file.host
    port = arguments.port if arguments.port is not None else file.port
    grpc_port = _grpc_port(arguments, file, port)
    if grpc_port == port:
        other = port + 1 if port < LAST_PORT else DEFAULT_GRPC_PORT
        message = f"HTTP and gRPC can't both have port {port}; choose another one, with --grpc-port {other}"
        raise CommandError(message, status=2)
    environment = server_environment(os.environ)
    _look_for_cluster(environment)
    if own_cluster(environment):  # the processes of another Ray would not have the secret
        environment |= probe_environment(file, environment)
    else:
        environment |= cluster_token(environment, allow_open=arguments.allow_open_cluster)
    stopping = _Stopping()
    with claim(port) as held, ExitStack() as until_the_end:
        remove_what_crashes_left()
        if own_cluster(environment):  # on a running cluster the port and the weights are needed on its nodes, not here
            require_free(host, port)
            if grpc_port is not None:
                require_free(host, grpc_port, "--grpc-port")
            if missing := shortages(file):  # Ray would wait forever for a machine that has them
                raise CommandError("; ".join(missing))
            environment |= ray_cpus(environment, schedulable_cpus(), os.cpu_count() or 1)
            os.environ.update(folder := ray_folder(environment))  # for `announce`, which looks for logs there
            environment |= folder
            environment |= own_token(environment, state_directory() / "ray_auth_token")
            environment |= _proxy_of(host, environment)
            _fetch_models(file)  # after the checks above, because it takes long
            if wanted_haproxy(environment):
                haproxy_folder = until_the_end.enter_context(private_folder(held.note))
                environment |= haproxy_environment(environment, held.launcher, haproxy_folder)
                until_the_end.callback(held.launcher.unlink, missing_ok=True)
                stopping.before((haproxy_folder / ENDED).touch)
        as_is = (host, port, grpc_port) == (file.host, file.port, file.grpc_port)
        path = file.path if as_is else _derived_config(file, host, port, grpc_port)
        with stopping:
            # In a session of its own the child does not get the terminal's Ctrl-C; this process passes it on once.
            child = subprocess.Popen(
                [*SERVE_RUN, str(path)],
                env=environment,
                stdin=subprocess.DEVNULL,
                pass_fds=(held.descriptor,),
                start_new_session=True,
            )
            stopping.of(child)
            held.record(child.pid, file.path)
            failed = _watch(child, file, announce.Address.of(file, host, port, grpc_port), stopping, environment)
            status = child.wait()
    return 1 if failed or (status and not stopping.begun) else 0


def _look_for_cluster(environment: Mapping[str, str]) -> None:
    """Raise CommandError when the cluster to serve on does not answer: Ray would wait minutes for it.

    A service with a Ray of its own starts all the same, with a note on the stale address that Ray has kept.
    """
    stale = stale_address(environment)
    if own_cluster(environment):
        if stale:
            print(f"serve-app serve: note: {stale}", file=sys.stderr)
        return
    named = environment["RAY_ADDRESS"]
    if named == "auto" and stale:
        raise CommandError(stale)
    if named != "auto" and not answers(named.partition("://")[2] or named):
        raise CommandError(f"no Ray cluster answers at {named}, the address in RAY_ADDRESS; correct or unset it")


def _grpc_port(arguments: argparse.Namespace, file: ConfigFile, port: int) -> int | None:
    """The port for gRPC; None: without. With `--port` alone, gRPC is as far from the config's port as HTTP is.

    So several services on one machine need one option each.
    """
    if arguments.grpc_port is not None:
        return arguments.grpc_port or None
    return None if file.grpc_port is None else file.grpc_port + port - file.port


def require_free(host: str, port: int, option: str = "--port") -> None:
    """Raise CommandError unless this process could listen there. `option`: sets the port."""
    if not 0 < port <= LAST_PORT:  # getaddrinfo takes them modulo 65536, and 0 would be any port
        advice = "" if option == "--port" else f"; set gRPC's with {option}"
        raise CommandError(f"there is no port {port}; ports go from 1 to {LAST_PORT}{advice}", status=2)
    other = port + 1 if port < LAST_PORT else DEFAULT_PORT
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise CommandError(f"can't listen on {host}:{port}: {error}", status=2) from error
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that has just ended is no obstacle
        try:
            probe.bind(address)
        except OSError as error:
            raise CommandError(
                f"port {port} on {host} can't be used ({error.strerror}); choose another one, with {option} {other} "
                f"or `make serve {option[2:].upper().replace('-', '_')}={other}`"
            ) from error


def _proxy_of(host: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Turns HAProxy off for an IPv6 `host`: HAProxy would look for the ingress replicas at 127.0.0.1."""
    if ":" not in host:
        return {}
    if environment.get(HA_PROXY) == "1":
        raise CommandError(f"HAProxy can't listen on the IPv6 address {host}; unset {HA_PROXY}, or use an IPv4 address")
    return {HA_PROXY: "0"}


def _fetch_models(file: ConfigFile) -> None:
    """Fetch before Ray starts, so that the terminal shows the progress and an error comes early."""
    from serve_app.cli.fetch import fetch  # imported late: not needed when a check before fails

    for app in file.apps:
        fetch(app.config)


def _derived_config(file: ConfigFile, host: str, port: int, grpc_port: int | None) -> Path:
    """A copy of the config with other addresses."""
    data = {**file.data, "http_options": {**(file.data.get("http_options") or {}), "host": host, "port": port}}
    if grpc_port != file.grpc_port:
        options = file.data.get("grpc_options") or {}
        functions = [] if grpc_port is None else options.get("grpc_servicer_functions") or [ADD_SERVICES]
        data["grpc_options"] = {**options, "port": grpc_port or options.get("port", DEFAULT_GRPC_PORT)}
        data["grpc_options"]["grpc_servicer_functions"] = functions
    path = state_directory() / "servers" / f"{port}.yaml"
    path.write_text(f"# {file.path}, with another address\n{yaml.safe_dump(data, sort_keys=False)}", encoding="utf-8")
    return path


def _watch(
    child: subprocess.Popen[bytes],
    file: ConfigFile,
    address: announce.Address,
    stopping: _Stopping,
    environment: Mapping[str, str],
) -> bool:
    """Show the service's stages until it is ready or ends. Returns whether it failed for good (and was stopped)."""
    if file.https:
        print(f"serving {file.path} on {address.url}; /ready there says when the model is loaded")
        return False
    said = ""
    with Client(address.url, api_key=environment.get(PROBE_SECRET), retries=0, timeout_s=10.0) as client:
        while child.poll() is None and not stopping.begun:
            try:
                state = client.ready()
            except AuthenticationError:  # a running cluster, which did not get our secret
                said = f"{address.url} asks for an API key; put one into {KEY_VARIABLE} to see when the model is loaded"
                print(said, flush=True)
                return False
            except ServeAppError:  # Serve's proxy does not listen yet, or has no route to the application yet
                state = Readiness(ready=False)
            if state.ready:
                announce.ready(file, address, child.pid, state)
                return False
            if state.error:
                print(f"\nserve-app serve: {state.error}", file=sys.stderr)
                child.send_signal(signal.SIGINT)
                return True
            if state.stage and state.stage != said:
                said = state.stage
                print(f"serve-app: {said}", flush=True)
            time.sleep(_POLL_S)
    return False


class _Stopping:
    """Passes a stop on to `serve run`: the first as SIGINT, which lets streams finish, further ones as SIGTERM.

    Enter it before the child starts. A signal with a handler here has its default action in the child, while one that
    is ignored here stays ignored there, as SIGINT is when a script's shell starts this program in the background.
    """

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._first: list[Callable[[], object]] = []
        self.begun = 0
        """How many signals have come."""

    def before(self, action: Callable[[], object]) -> None:
        """Do this when the stop begins, before the child is told; in a handler of signals, so it must be brief."""
        self._first.append(action)

    def of(self, child: subprocess.Popen[bytes]) -> None:
        """Pass signals on to `child` from now on; one that came before goes to it at once, as SIGINT."""
        self._child = child
        if self.begun:
            child.send_signal(signal.SIGINT)

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._forward) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _forward(self, number: int, _: FrameType | None) -> None:
        self.begun += 1
        if self.begun == 1:
            for action in self._first:
                action()
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(signal.SIGINT if self.begun == 1 else signal.SIGTERM)
        if self.begun == 1:
            os.write(2, b"\nserve-app: stopping; streams in progress may finish (Ctrl-C again ends them)\n")
