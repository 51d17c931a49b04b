"""What a real HAProxy, with Serve's configuration as it is rewritten, answers by itself, and who reaches its files."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app.cli import haproxy, haproxy_config
from serve_app.cli.haproxy import bundled_haproxy
from serve_app.cli.haproxy_config import REWRITTEN, rewriting
from serve_app.cli.private_folder import private_folder
from serve_app.deployments.client_address import HEADER, SECRET

pytestmark = pytest.mark.skipif(bundled_haproxy() is None, reason="ray[serve] brings no HAProxy here")
from haproxy_runner import Behaviour, Behind, Running, answer, running_haproxy  # noqa: E402 - needs HAProxy

Start = Callable[..., AbstractContextManager[Running]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """start(servers, **fields of Serve's HAProxyConfig)."""
    with private_folder(tmp_path / "note") as folder:
        (port,) = haproxy._free_ports(1)
        yield partial(running_haproxy, folder, port)


def well(connection: socket.socket, _: bytes) -> None:
    connection.sendall(answer(200))


def goes(connection: socket.socket, _: bytes) -> None:
    """As an ingress replica that is killed."""


def half_a_header(connection: socket.socket, _: bytes) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-")


def speaks_no_http(connection: socket.socket, _: bytes) -> None:
    connection.sendall(b"what?\r\n\r\n")


def says_nothing(connection: socket.socket, _: bytes) -> None:
    while connection.recv(4096):
        pass


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error, in OpenAI's form."""
    assert response.headers["content-type"] == "application/json"
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("behaviour", "status", "code", "retry_after"),
    [
        (goes, 502, "replica_lost", "1"),
        (half_a_header, 502, "replica_lost", "1"),
        (speaks_no_http, 502, "replica_lost", "1"),
        (says_nothing, 504, "deadline_exceeded", None),
    ],
)
def test_what_an_ingress_does_not_answer(
    start: Start, behaviour: Behaviour, status: int, code: str, retry_after: str | None
) -> None:
    with Behind(behaviour) as behind, start([behind.port], timeout_server_s=1) as running:
        response = httpx.post(f"http://127.0.0.1:{running.port}/stream", json={"prompt": "Hi"}, timeout=60)
        assert (response.status_code, error_of(response)["code"]) == (status, code)
        assert response.headers.get("retry-after") == retry_after
        assert ("x-should-retry" in response.headers) == (retry_after is None)


def test_no_request_line_goes_to_the_systems_log(start: Start) -> None:
    with Behind(well) as behind, start([behind.port]) as running:
        (written,) = running.folder.rglob("haproxy.cfg")
        assert REWRITTEN in written.read_text()
        assert "local0" not in written.read_text()


def test_a_log_that_was_asked_for_is_kept() -> None:
    scripts = [rewriting([1], "secret", logs_requests=asked_for) for asked_for in (False, True)]
    assert ["local0" in script for script in scripts] == [True, False]


def test_no_ingress_at_all(start: Start) -> None:
    (nobody,) = haproxy._free_ports(1)
    with start([nobody]) as running:
        response = httpx.get(f"http://127.0.0.1:{running.port}/v1/models", timeout=60)
        assert (response.status_code, error_of(response)["code"]) == (503, "overloaded")
        assert response.headers["retry-after"] == "1"


@pytest.mark.parametrize(("servers", "status", "code"), [(None, 503, "not_ready"), ([], 503, "overloaded")])
def test_until_there_is_a_route_or_a_server_clients_are_told_to_come_again(
    start: Start, servers: list[int] | None, status: int, code: str
) -> None:
    with start(servers) as running:
        for path in ("/v1/models", "/-/healthz", "/-/routes") if servers is None else ("/v1/models",):
            response = httpx.get(f"http://127.0.0.1:{running.port}{path}", timeout=60)
            assert (response.status_code, error_of(response)["code"]) == (status, code)
            assert response.headers["retry-after"] == "1"


def test_a_path_beside_every_application(start: Start) -> None:
    with Behind(well) as behind, start([behind.port], prefix="/app") as running:
        response = httpx.get(f"http://127.0.0.1:{running.port}/elsewhere", timeout=60)
        assert (response.status_code, error_of(response)["code"]) == (404, "not_found")
        assert "retry-after" not in response.headers


def exchange(port: int, request: bytes) -> httpx.Response:
    """Send these bytes, and read what comes until the other side closes."""
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(request)
        while piece := connection.recv(65536):
            received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = [tuple(line.split(": ", 1)) for line in lines]
    return httpx.Response(int(first.split()[1]), headers=headers, content=body)  # type: ignore[arg-type]


GET, HOST = b"GET /stream HTTP/1.1\r\n", b"Host: localhost\r\nConnection: close\r\n"


@pytest.mark.parametrize(
    ("request_bytes", "status", "code"),
    [
        (b"GET /stream?prompt=" + b"a" * 32_768 + b" HTTP/1.1\r\n" + HOST + b"\r\n", 414, "url_too_long"),
        (b"GET /stream?prompt=" + b"a" * 100_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", 414, "url_too_long"),
        (GET + HOST + b"X: " + b"a" * 32_768 + b"\r\n\r\n", 431, "headers_too_long"),
        (GET + HOST + (b"X: " + b"y" * 400 + b"\r\n") * 90 + b"\r\n", 431, "headers_too_long"),
        (b"FOO /stream HTTP/1.1\r\n" + HOST + b"\r\n", 405, "method_not_allowed"),
        (
            b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost:80\r\nConnection: close\r\n\r\n",
            405,
            "method_not_allowed",
        ),
    ],
    ids=["long URL", "longer URL", "long header", "many headers", "unknown method", "CONNECT"],
)
def test_what_haproxy_refuses_itself(start: Start, request_bytes: bytes, status: int, code: str) -> None:
    with Behind(well) as behind, start([behind.port]) as running:
        response = exchange(running.port, request_bytes)
        assert (response.status_code, error_of(response)["code"]) == (status, code)
        assert response.headers.get("allow") == ("DELETE, GET, HEAD, OPTIONS, POST" if status == 405 else None)
        assert behind.requests == []


def test_a_url_within_the_stated_limit_is_served(start: Start) -> None:
    with Behind(well) as behind, start([behind.port]) as running:
        path = "/stream?prompt=" + "a" * (32_768 - 15)
        assert httpx.get(f"http://127.0.0.1:{running.port}{path}", timeout=60).status_code == 200


def test_an_ingress_is_told_the_client_and_not_what_the_client_says(start: Start) -> None:
    with Behind(well) as behind, start([behind.port]) as running:
        claims = {HEADER: "192.0.2.1", "x-forwarded-for": "192.0.2.1"}
        httpx.get(f"http://127.0.0.1:{running.port}/ready", headers=claims, timeout=60)
        [request] = behind.requests
        told = [line for line in request.decode().splitlines() if line.lower().startswith(HEADER)]
        assert told == [f"{HEADER}: {running.environment[SECRET]} 127.0.0.1"]


def test_a_client_that_sends_no_headers_is_given_up(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(haproxy_config, "HEADER_TIMEOUT_S", 1)
    with Behind(well) as behind, start([behind.port]) as running:
        assert exchange(running.port, b"POST /stream HTTP/1.1\r\nHost: localhost\r\n").status_code == 408
        with socket.create_connection(("127.0.0.1", running.port), timeout=60) as silent:
            assert silent.recv(1) == b""  # closed, without an answer to what was never asked
        assert behind.requests == []


def outlast_the_headers_limit(port: int) -> None:
    """Return when HAProxy has given up a client that connected now and sends no headers."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as silent:
        assert silent.recv(1) == b""


def test_a_body_that_comes_slowly_passes(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time limit of the headers does not end a body, whose time the ingress limits."""
    monkeypatch.setattr(haproxy_config, "HEADER_TIMEOUT_S", 1)
    pieces = [b'{"prompt": ', b'"Hi"}']

    def whole(connection: socket.socket, request: bytes) -> None:
        while not request.endswith(pieces[-1]):
            piece = connection.recv(65536)
            if not piece:
                return
            request += piece
        connection.sendall(answer(200))

    with Behind(whole) as behind, start([behind.port]) as running:

        def slowly() -> Iterator[bytes]:
            yield pieces[0]
            outlast_the_headers_limit(running.port)
            yield pieces[1]

        url = f"http://127.0.0.1:{running.port}/stream"
        headers = {"content-length": str(sum(map(len, pieces)))}
        assert httpx.post(url, content=slowly(), headers=headers, timeout=60).status_code == 200


def test_an_answer_that_comes_slowly_passes(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time limit of the headers does not end an answer."""
    monkeypatch.setattr(haproxy_config, "HEADER_TIMEOUT_S", 1)
    ports: list[int] = []

    def slow(connection: socket.socket, _: bytes) -> None:
        outlast_the_headers_limit(ports[0])
        connection.sendall(answer(200))

    with Behind(slow) as behind, start([behind.port]) as running:
        ports.append(running.port)
        assert httpx.get(f"http://127.0.0.1:{running.port}/ready", timeout=60).status_code == 200


INTRUDER = """
import os, socket, sys
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
admin = socket.socket(socket.AF_UNIX)
try:
    admin.connect(sys.argv[1])
except OSError as error:
    print(type(error).__name__, end="")
"""
"""A user who has nothing to do with the service."""


def command(path: Path) -> bytes:
    """What HAProxy's admin socket answers to a command."""
    with socket.socket(socket.AF_UNIX) as admin:
        admin.settimeout(60)
        admin.connect(str(path))
        admin.sendall(b"set server app/s0 addr 192.0.2.1\n")
        return admin.recv(4096)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else")
@pytest.mark.parametrize("opened", [False, True], ids=["as it is", "in a folder that somebody opened"])
def test_nobody_else_reaches_the_admin_socket(start: Start, opened: bool) -> None:
    with Behind(well) as behind, start([behind.port]) as running:
        assert command(running.socket_path)  # its owner does
        if opened:
            running.folder.chmod(0o755)
        intruder = [sys.executable, "-c", INTRUDER, str(running.socket_path)]
        done = subprocess.run(intruder, capture_output=True, text=True, timeout=120, check=True)
        assert done.stdout == "PermissionError"


def test_the_modes_say_so(start: Start) -> None:
    with start([1]) as running:
        assert stat.S_IMODE(running.folder.stat().st_mode) == 0o700
        assert stat.S_IMODE(running.socket_path.stat().st_mode) == 0o600
