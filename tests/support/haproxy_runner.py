"""Runs the bundled HAProxy as `serve-app serve` does: Serve's own configuration, our launcher, real sockets."""

from __future__ import annotations

import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from ray.serve._private.common import RequestProtocol
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions, gRPCOptions

from serve_app.cli.haproxy import haproxy_environment

NODE = "f" * 56
"""Ray's ids of nodes are so long."""
Behaviour = Callable[[socket.socket, bytes], None]


@dataclass
class Behind:
    """A server behind HAProxy that is well when asked, and treats each request as the test says."""

    behaviour: Behaviour
    requests: list[bytes] = field(default_factory=list)
    """What it got but the questions for its health."""
    well: bool = True

    def __enter__(self) -> Behind:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=[connection], daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(ConnectionError):  # HAProxy has what it wanted to know
            request = b""
            while b"\r\n\r\n" not in request:
                piece = connection.recv(65536)
                if not piece:
                    return
                request += piece
            if b"/-/healthz" in request:
                connection.sendall(answer(200 if self.well else 503))
            else:
                self.requests.append(request)
                self.behaviour(connection, request)


def answer(status: int, body: bytes = b"{}") -> bytes:
    """A whole response, after which the server closes."""
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Connection: close\r\n\r\n" + body


@dataclass(frozen=True)
class Running:
    """A HAProxy that answers."""

    port: int
    folder: Path
    socket_path: Path
    environment: dict[str, str]
    """What Serve and its replicas are given."""
    process: subprocess.Popen[bytes]


@contextmanager
def running_haproxy(
    folder: Path,
    port: int,
    servers: list[int] | None,
    *,
    prefix: str = "/",
    grpc: tuple[int, int] | None = None,
    **settings: object,
) -> Iterator[Running]:
    """HAProxy on 127.0.0.1:`port`, with an application that these ports serve; None: Serve knows of none yet.

    `grpc`: the port where it takes gRPC, and the one that serves it.
    """
    environment = haproxy_environment({}, folder / "launcher", folder)
    places = {
        "socket_path": str(folder / NODE / "a.sock"),
        "metrics_socket_path": str(folder / NODE / "m.sock"),
        "server_state_base": str(folder / NODE),
        "server_state_file": str(folder / NODE / "server-state"),
        "stats_port": int(environment["RAY_SERVE_HAPROXY_STATS_PORT"]),
        "bufsize": int(environment["RAY_SERVE_HAPROXY_TUNE_BUFSIZE"]),
        "metrics_port": int(environment["RAY_SERVE_HAPROXY_METRICS_PORT"]),
    }
    known = servers is not None
    functions = ["serve_app.api.grpc.services.add_services"]
    grpc_options = gRPCOptions() if grpc is None else gRPCOptions(port=grpc[0], grpc_servicer_functions=functions)
    config = HAProxyConfig(
        http_options=HTTPOptions(host="127.0.0.1", port=port),
        grpc_options=grpc_options,
        is_head=True,
        has_received_routes=known,
        has_received_servers=known,
        **{**places, **settings},  # type: ignore[arg-type]
    )
    members = [ServerConfig(f"s{number}", "127.0.0.1", number) for number in servers or []]
    backends = {"app": BackendConfig("app", prefix, servers=members, app_name="app")} if known else {}
    if known and grpc is not None:
        member = ServerConfig("g", "127.0.0.1", grpc[1])
        backends["grpc"] = BackendConfig(
            "grpc-app", prefix, servers=[member], app_name="app", protocol=RequestProtocol.GRPC
        )
    api = HAProxyApi(config, backends, str(folder / NODE / "haproxy.cfg"))
    if grpc is not None:
        api.set_grpc_fallback_server(ServerConfig("fallback", "127.0.0.1", grpc[1]))
    api._generate_config_file_internal()
    command = [environment["RAY_SERVE_HAPROXY_BINARY_PATH"], "-db", "-f", api.config_file_path]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        try:
            _until_it_listens(port, Path(config.socket_path), process)
            yield Running(port, folder, Path(config.socket_path), environment, process)
        finally:
            process.kill()


def _until_it_listens(port: int, admin: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while True:
        assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
            admin.stat()
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        else:
            return
