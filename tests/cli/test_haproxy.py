"""HAProxy's launcher: what it binds where, on which ports, and when there is none."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from serve_app.cli import haproxy
from serve_app.cli.command_error import CommandError
from serve_app.cli.haproxy import ENABLE, bundled_haproxy, haproxy_environment
from serve_app.cli.haproxy_config import REWRITTEN

pytestmark = pytest.mark.skipif(bundled_haproxy() is None, reason="ray[serve] brings no HAProxy here")
CONFIG = """\
frontend prometheus
    bind :{metrics}
frontend http_frontend
    bind *:8000
listen stats
  bind *:{statistics}
  bind *:{statistics}1
"""


def ports(environment: dict[str, str]) -> dict[str, int]:
    return {
        "statistics": int(environment["RAY_SERVE_HAPROXY_STATS_PORT"]),
        "metrics": int(environment["RAY_SERVE_HAPROXY_METRICS_PORT"]),
        "fallback": int(environment["RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"]),
        "gRPC fallback": int(environment["RAY_SERVE_FALLBACK_PROXY_GRPC_PORT"]),
    }


def test_only_its_own_ports_are_bound_to_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "a program's folder" / "haproxy"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho started with "$@"\n')
    program.chmod(0o755)
    monkeypatch.setattr(haproxy, "bundled_haproxy", lambda: program)
    environment = haproxy_environment({}, tmp_path / "launcher", tmp_path)
    assert environment[ENABLE] == "1"
    numbers = ports(environment)
    config = tmp_path / "haproxy.cfg"
    config.write_text(CONFIG.format(**numbers))
    command = [environment["RAY_SERVE_HAPROXY_BINARY_PATH"], "-db", "-f", str(config), "-dR", "-sf", "12"]
    for _ in range(2):  # at each reload
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert output == f"started with -db -f {config} -sf 12\n"  # -dR: no SO_REUSEPORT
    expected = f"{REWRITTEN}\n" + CONFIG.replace("bind :{metrics}", "bind 127.0.0.1:{metrics}")
    expected = expected.replace("bind *:{statistics}\n", "bind 127.0.0.1:{statistics}\n")
    written = config.read_text()
    assert written.count(REWRITTEN) == 1
    lines = [line for line in written.splitlines(keepends=True) if "http-request " not in line]
    assert "".join(lines) == expected.format(**numbers)


def test_what_serve_writes_is_what_is_rewritten() -> None:
    """Serve's own template, rendered only as far as it matters: a Ray that binds otherwise is noticed here."""
    from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE as template

    binds = [line.strip() for line in template.splitlines() if line.strip().startswith("bind ")]
    assert "bind :{{ config.metrics_port }}" in binds
    assert "bind *:{{ config.stats_port }}" in binds
    assert "    http-request return status 404 content-type text/plain lf-string" in template
    assert "    use_backend {{ backend.name" in template
    assert "    stats socket {{ config.socket_path }} mode 666 level admin" in template
    assert [line for line in template.splitlines() if line in ("defaults", "frontend http_frontend")] == [
        "defaults",
        "frontend http_frontend",
    ]
    elsewhere = [line for line in binds if "frontend_host" not in line and "metrics_port" not in line]
    assert elsewhere == ["bind *:{{ config.stats_port }}"]


@pytest.mark.parametrize(("users", "expected"), [({}, "1 131072"), ({"MALLOC_ARENA_MAX": "4"}, "4 131072")])
def test_its_threads_share_one_arena_unless_the_user_wants_more(
    users: dict[str, str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "haproxy"
    program.write_text("#!/bin/sh\necho $MALLOC_ARENA_MAX $MALLOC_TRIM_THRESHOLD_\n")
    program.chmod(0o755)
    monkeypatch.setattr(haproxy, "bundled_haproxy", lambda: program)
    launcher = haproxy_environment({}, tmp_path / "launcher", tmp_path)["RAY_SERVE_HAPROXY_BINARY_PATH"]
    others = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    run = subprocess.run([launcher, "-v"], env=others | users, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == expected


def test_services_get_ports_of_their_own(tmp_path: Path) -> None:
    both = [set(ports(haproxy_environment({}, tmp_path / name, tmp_path)).values()) for name in ("a", "b")]
    assert [len(numbers) for numbers in both] == [4, 4]
    assert both[0] != both[1]  # one may be in both, by chance


def test_no_port_is_one_that_somebody_else_is_given_meanwhile() -> None:
    """A Ray that takes others is noticed here."""
    from ray.serve._private import constants

    given = [
        range(10_002, 20_000),  # to Ray's workers
        range(32_768, 61_000),  # to whoever asks Linux for any
        range(constants.RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT, constants.RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT + 1),
        range(constants.RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT, constants.RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT + 1),
    ]
    assert not [port for port in haproxy._free_ports(100) if any(port in others for others in given)]


def test_a_port_that_somebody_has_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(haproxy, "PORTS", [server.getsockname()[1]])
        with pytest.raises(CommandError, match="1 free ports"):
            haproxy._free_ports(1)


@pytest.mark.parametrize("protocol", ["HTTP", "GRPC"])
def test_serve_takes_the_port_of_the_proxy_behind_it(protocol: str, tmp_path: Path) -> None:
    """In a process of its own: a Ray that reads another variable is noticed here."""
    environment = haproxy_environment({}, tmp_path / "launcher", tmp_path)
    name = f"RAY_SERVE_FALLBACK_PROXY_{protocol}_PORT"
    code = f"from ray.serve._private import constants; print(constants.{name})"
    run = subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, check=True)
    assert run.stdout.decode().strip() == environment[name]


@pytest.mark.parametrize("set_by_the_user", [{ENABLE: "0"}, {"RAY_SERVE_HAPROXY_BINARY_PATH": "/opt/haproxy"}])
def test_what_the_user_has_set_is_left_alone(set_by_the_user: dict[str, str], tmp_path: Path) -> None:
    assert haproxy_environment(set_by_the_user, tmp_path / "launcher", tmp_path) == {}


def test_where_there_is_none_serves_python_proxy_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(haproxy, "bundled_haproxy", lambda: None)
    assert haproxy_environment({}, tmp_path / "launcher", tmp_path) == {}
    assert not (tmp_path / "launcher").exists()
