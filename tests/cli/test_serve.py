"""serve-app serve and stop, with a stand-in for `serve run`: what they say, what they signal, how they end."""

from __future__ import annotations

import argparse
import fcntl
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, TextIO

import pytest
import yaml
from forked_programs import ForkedProgram
from served_program import serve_app, serve_app_without_user

from serve_app.cli import serve
from serve_app.cli.command_error import CommandError
from serve_app.cli.environment import own_cluster, ray_cpus, server_environment
from serve_app.cli.haproxy import bundled_haproxy
from serve_app.cli.main import main
from serve_app.cli.state import RunningServer, claim, remove_what_crashes_left, running_servers

AS_A_USER_DOES = "import sys, served_program; sys.exit(served_program.serve_app(sys.argv[1:]))"


PORTS = range(31_100, 32_700, 10)
"""Below the ports that the kernel gives to whoever asks for any, so that other tests don't take one of ours, and above
those of Ray and Serve."""


@pytest.fixture
def port() -> int:
    """A port that nobody listens on, nor on the nine after it."""
    for first in random.sample(PORTS, len(PORTS)):
        with ExitStack() as probes, suppress(OSError):
            for number in range(first, first + 10):
                probes.enter_context(socket.socket()).bind(("127.0.0.1", number))
            return first
    raise AssertionError("all ports are taken")


@pytest.fixture
def config(tmp_path: Path, port: int) -> Path:
    document = {
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [{"name": "a", "route_prefix": "/", "import_path": "serve_app.app:build", "args": {}}],
    }
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


class Serving:
    """A `serve-app serve` in a process of its own."""

    process: ForkedProgram | subprocess.Popen[str]

    def __init__(
        self,
        *arguments: str,
        mode: str = "ready",
        program: Callable[[list[str]], int] | None = serve_app,
        **environment: str,
    ) -> None:
        """`program`: None for one that begins with its imports, and inherits what a user's does."""
        settings = {**os.environ, "FAKE_SERVE_RUN": mode, **environment}
        if program is None:
            command = [sys.executable, "-c", AS_A_USER_DOES, "serve", *arguments]
            settings["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=settings
            )
        else:
            self.process = ForkedProgram(program, ["serve", *arguments], settings)
        self.output = ""

    def wait_for(self, text: str) -> None:
        assert self.process.stdout is not None
        while text not in self.output:
            line = self.process.stdout.readline()
            assert line, f"it ended before {text!r}:\n{self.output}"
            self.output += line

    def end(self) -> int:
        """Read to the end; the exit status."""
        assert self.process.stdout is not None
        self.output += self.process.stdout.read()
        return self.process.wait(30)


@pytest.fixture
def start() -> Iterator[Callable[..., Serving]]:
    """Start services; what is left of them ends with the test."""
    started: list[Serving] = []

    def begin(*arguments: str, **settings: Any) -> Serving:
        started.append(Serving(*arguments, **settings))
        watchdog = threading.Timer(60, started[-1].process.kill)
        watchdog.daemon = True
        watchdog.start()
        return started[-1]

    yield begin
    for server in running_servers():
        os.kill(server.pid, signal.SIGKILL)
    for serving in started:
        serving.process.kill()
        serving.process.wait(10)
    deadline = time.monotonic() + 10
    while running_servers() and time.monotonic() < deadline:
        time.sleep(0.01)
    remove_what_crashes_left()


def with_keys(config: Path, content: str) -> None:
    """Give the config a file of keys."""
    keys = config.with_name("keys.yaml")
    keys.write_text(content)
    document = yaml.safe_load(config.read_text())
    document["applications"][0]["args"] = {"auth": {"keys_file": str(keys)}}
    config.write_text(yaml.safe_dump(document))


def test_it_sees_a_service_that_asks_for_keys(config: Path, start: Callable[..., Serving]) -> None:
    with_keys(config, "keys: []")
    serving = start(str(config))
    serving.wait_for("serve_app is ready at")
    serving.wait_for("SERVE_APP_API_KEY")
    serving.process.send_signal(signal.SIGINT)
    assert serving.end() == 0


def test_it_does_not_wait_where_it_may_not_ask(config: Path, start: Callable[..., Serving]) -> None:
    serving = start(str(config), mode="asks")
    serving.wait_for("asks for an API key; put one into SERVE_APP_API_KEY")
    serving.process.send_signal(signal.SIGINT)
    assert serving.end() == 0


def test_broken_keys_are_told_before_anything_starts(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_keys(config, "keys: 3")
    assert main(["serve", str(config)]) == 2
    assert "keys.yaml:1: keys: Input should be a valid list" in capsys.readouterr().err


def test_it_shows_the_stages_and_what_it_holds(config: Path, port: int, start: Callable[..., Serving]) -> None:
    serving = start(str(config))
    serving.wait_for(f"curl -N http://127.0.0.1:{port}/stream")
    for text in ("fetching", "serve-app: loading weights", f"serve_app is ready at http://127.0.0.1:{port}", "fake-1"):
        assert text in serving.output
    assert "2 streams of 2,048 tokens" in serving.output
    assert "0.54 GB of weights and 1.07 GB of KV cache" in serving.output
    assert "Ctrl-C here, or serve-app stop in another terminal" in serving.output
    assert "a note" in serving.output
    assert f"fake serve run: run {config}, RAY_ADDRESS=local" in serving.output
    (running,) = running_servers()
    assert running == RunningServer(port, running.pid, str(config))
    serving.process.send_signal(signal.SIGINT)
    assert serving.end() == 0
    assert serving.output.count("got SIGINT") == 1
    assert running_servers() == []


def test_another_port_goes_into_a_copy_of_the_config(
    config: Path, port: int, state: Path, start: Callable[..., Serving]
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        other = int(probe.getsockname()[1])
    serving = start(str(config), "--port", str(other), "--host", "localhost")
    serving.wait_for(f"serve_app is ready at http://localhost:{other}")
    derived = yaml.safe_load((state / "servers" / f"{other}.yaml").read_text())
    assert derived.pop("http_options") == {"host": "localhost", "port": other}
    original = yaml.safe_load(config.read_text())
    assert original.pop("http_options") == {"host": "127.0.0.1", "port": port}
    assert derived == original


ADD_SERVICES = "serve_app.api.grpc.services.add_services"


@pytest.fixture
def with_grpc(config: Path, port: int) -> Path:
    """The config, with gRPC 7 above the port of HTTP."""
    data = yaml.safe_load(config.read_text())
    data["grpc_options"] = {"port": port + 7, "grpc_servicer_functions": [ADD_SERVICES]}
    config.write_text(yaml.safe_dump(data))
    return config


@pytest.mark.parametrize(
    ("options", "grpc_port"),
    [([], 7), (["--port", "+1"], 8), (["--port", "+1", "--grpc-port", "+3"], 3), (["--grpc-port", "0"], None)],
)
def test_the_port_of_grpc(
    with_grpc: Path, port: int, state: Path, start: Callable[..., Serving], options: list[str], grpc_port: int | None
) -> None:
    """`+1`: the config's port of HTTP, and 1."""
    given = [str(port + int(each)) if each.startswith("+") else each for each in options]
    serving = start(str(with_grpc), *given)
    serving.wait_for("  URLs " if grpc_port is None else f"gRPC at 127.0.0.1:{port + grpc_port}")
    serving.wait_for("  try ")
    assert ("gRPC" in serving.output) == (grpc_port is not None)
    derived = state / "servers" / f"{given[1] if '--port' in given else port}.yaml"
    if not options:
        assert not derived.exists()
        return
    made = yaml.safe_load(derived.read_text())["grpc_options"]
    assert made["grpc_servicer_functions"] == ([] if grpc_port is None else [ADD_SERVICES])
    assert made["port"] == port + (7 if grpc_port is None else grpc_port)


def test_grpc_for_a_config_without_it(config: Path, port: int, state: Path, start: Callable[..., Serving]) -> None:
    serving = start(str(config), "--grpc-port", str(port + 1))
    serving.wait_for(f"gRPC at 127.0.0.1:{port + 1}")
    made = yaml.safe_load((state / "servers" / f"{port}.yaml").read_text())["grpc_options"]
    assert made == {"port": port + 1, "grpc_servicer_functions": [ADD_SERVICES]}


def test_a_taken_port_of_grpc(with_grpc: Path, port: int, start: Callable[..., Serving]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port + 7))
        taken.listen()
        serving = start(str(with_grpc))
        assert serving.end() == 1
    assert f"port {port + 7} on 127.0.0.1 can't be used" in serving.output
    assert f"--grpc-port {port + 8} or `make serve GRPC_PORT={port + 8}`" in serving.output


def test_a_port_of_grpc_that_does_not_exist(with_grpc: Path, start: Callable[..., Serving]) -> None:
    serving = start(str(with_grpc), "--grpc-port", "70000")
    assert serving.end() == 2
    assert "there is no port 70000; ports go from 1 to 65535; set gRPC's with --grpc-port" in serving.output


def test_one_port_for_both(with_grpc: Path, port: int) -> None:
    arguments = argparse.Namespace(config=str(with_grpc), host=None, port=port, grpc_port=port)
    with pytest.raises(CommandError, match=f"can't both have port {port}; .* --grpc-port {port + 1}"):
        serve.run(arguments)


def test_two_services_and_stop(
    config: Path, port: int, tmp_path: Path, start: Callable[..., Serving], capsys: pytest.CaptureFixture[str]
) -> None:
    first = start(str(config))
    first.wait_for("serve_app is ready")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        other = int(probe.getsockname()[1])
    second = start(str(config), "--port", str(other))
    second.wait_for("serve_app is ready")
    assert [server.port for server in running_servers()] == sorted([port, other])

    assert main(["stop"]) == 1
    assert "several services run" in capsys.readouterr().err
    assert main(["stop", "--port", "1"]) == 1
    assert "serves nothing on port 1" in capsys.readouterr().err

    assert main(["stop", "--port", str(other)]) == 0
    assert second.end() == 0
    assert main(["stop"]) == 0
    assert first.end() == 0
    assert main(["stop"]) == 0
    assert "nothing to stop" in capsys.readouterr().out


def test_stop_all(config: Path, start: Callable[..., Serving]) -> None:
    serving = start(str(config))
    serving.wait_for("serve_app is ready")
    assert main(["stop", "--all"]) == 0
    assert serving.end() == 0


def test_stop_insists(config: Path, start: Callable[..., Serving]) -> None:
    serving = start(str(config), mode="stubborn")
    serving.wait_for("serve_app is ready")
    assert main(["stop", "--timeout", "0.5"]) == 0
    serving.end()
    assert "got SIGINT" in serving.output
    assert "got SIGTERM" in serving.output


def test_a_service_in_the_background_of_a_script_can_be_stopped(config: Path, start: Callable[..., Serving]) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # what a shell without job control gives to `command &`
    try:
        serving = start(str(config), program=None)
    finally:
        signal.signal(signal.SIGINT, before)
    serving.wait_for("serve_app is ready")
    assert main(["stop", "--timeout", "20"]) == 0
    assert serving.end() == 0
    assert "got SIGINT" in serving.output


def test_ctrl_c_twice_ends_what_does_not_end(config: Path, start: Callable[..., Serving]) -> None:
    serving = start(str(config), mode="stubborn")
    serving.wait_for("serve_app is ready")
    serving.process.send_signal(signal.SIGINT)
    serving.wait_for("got SIGINT")
    serving.process.send_signal(signal.SIGINT)
    assert serving.end() == 0
    assert "got SIGTERM" in serving.output


def test_stop_reaches_a_service_whose_watcher_was_killed(config: Path, start: Callable[..., Serving]) -> None:
    serving = start(str(config))
    serving.wait_for("serve_app is ready")
    serving.process.kill()
    serving.process.wait(10)
    assert len(running_servers()) == 1
    assert main(["stop"]) == 0
    assert running_servers() == []


@pytest.mark.skipif(bundled_haproxy() is None, reason="ray[serve] brings no HAProxy here")
@pytest.mark.parametrize("end", ["stop", "kill, stop", "kill all, start"])
def test_haproxys_files_are_private_and_go_with_the_service(
    config: Path, port: int, start: Callable[..., Serving], state: Path, end: str
) -> None:
    serving = start(str(config))
    serving.wait_for("serve_app is ready")
    folder = Path((state / "servers" / f"{port}.folder").read_text())
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    if end.startswith("kill"):
        [server] = running_servers()
        serving.process.kill()
        serving.process.wait(10)
        if "all" in end:
            os.kill(server.pid, signal.SIGKILL)
        assert folder.exists()
    if end.endswith("stop"):
        assert main(["stop"]) == 0
        serving.process.wait(10)
        assert sorted(path.name for path in (state / "servers").iterdir()) == [f"{port}.json"]
    else:
        again = start(str(config))
        again.wait_for("serve_app is ready")
    assert not folder.exists()


def test_a_model_that_can_not_be_loaded_ends_it(config: Path, start: Callable[..., Serving]) -> None:
    serving = start(str(config), mode="fails")
    assert serving.end() == 1
    assert "serve-app serve: There is no folder /x." in serving.output
    assert "got SIGINT" in serving.output


def test_a_serve_run_that_dies_is_an_error(config: Path, start: Callable[..., Serving]) -> None:
    assert start(str(config), mode="dies").end() == 1


def test_the_same_port_twice(config: Path, port: int, start: Callable[..., Serving]) -> None:
    start(str(config)).wait_for("serve_app is ready")
    second = start(str(config))
    assert second.end() == 1
    assert f"already serves on port {port}; stop it with `serve-app stop --port {port}`" in second.output


def test_a_port_that_something_else_has(config: Path, port: int, start: Callable[..., Serving]) -> None:
    with socket.create_server(("127.0.0.1", port)):
        serving = start(str(config))
        assert serving.end() == 1
    assert f"port {port} on 127.0.0.1 can't be used (Address already in use)" in serving.output
    assert f"make serve PORT={port + 1}" in serving.output
    assert "fetching" not in serving.output


@pytest.mark.parametrize("port", [-1, 0, 65536])
def test_ports_that_do_not_exist(port: int) -> None:
    with pytest.raises(CommandError, match=f"there is no port {port}"):
        serve.require_free("127.0.0.1", port)


def test_free_ports(port: int) -> None:
    serve.require_free("127.0.0.1", port)
    serve.require_free("localhost", port)
    serve.require_free("0.0.0.0", port)


def test_a_host_that_is_none(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(config), "--host", "no such host"]) == 2
    assert "can't listen on no such host:" in capsys.readouterr().err


def test_a_config_with_mistakes_starts_nothing(config: Path, start: Callable[..., Serving]) -> None:
    config.write_text(config.read_text().replace("args: {}", "args: {engin: {}}"))
    serving = start(str(config))
    assert serving.end() == 2
    assert "did you mean `engine`?" in serving.output
    assert "fake serve run" not in serving.output


def test_a_machine_without_what_the_config_needs_starts_nothing(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    document = yaml.safe_load(config.read_text())
    document["applications"][0]["args"] = {"model_server": {"num_gpus": 99, "num_cpus": 0}, "ingress": {"num_cpus": 0}}
    config.write_text(yaml.safe_dump(document))
    monkeypatch.setattr(serve, "_fetch_models", lambda file: pytest.fail("nothing may be fetched for it"))
    assert main(["serve", str(config)]) != 0
    said = capsys.readouterr().err
    assert "GPUs needed: 99" in said
    assert "set num_gpus: 0" in said


def test_what_the_user_has_set_stays() -> None:
    environment = server_environment({"RAY_ADDRESS": "10.0.0.1:6379", "HOME": "/home/me"})
    assert environment["RAY_ADDRESS"] == "10.0.0.1:6379"
    assert environment["RAY_USAGE_STATS_ENABLED"] == "0"
    assert environment["HOME"] == "/home/me"
    assert not own_cluster(environment)
    assert own_cluster(server_environment({}))


def test_an_empty_ray_address_is_none() -> None:
    assert server_environment({"RAY_ADDRESS": ""})["RAY_ADDRESS"] == "local"


@pytest.fixture
def stale(monkeypatch: pytest.MonkeyPatch, port: int) -> Iterator[str]:
    """The address of a cluster that has ended, as Ray keeps it."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # with a path as short as those of sockets must be
        noted = Path(folder, "ray", "ray_current_cluster")
        noted.parent.mkdir()
        noted.write_text(f"127.0.0.1:{port}")
        monkeypatch.setenv("RAY_TMPDIR", folder)
        yield f"rm {noted}"


def test_a_stale_address_is_said_and_the_service_starts(
    config: Path, stale: str, start: Callable[..., Serving]
) -> None:
    serving = start(str(config))
    serving.wait_for("serve_app is ready")
    serving.process.send_signal(signal.SIGINT)
    assert serving.end() == 0
    assert serving.output.count(stale) == 1


def test_a_cluster_that_does_not_answer_is_not_waited_for(
    config: Path, stale: str, port: int, start: Callable[..., Serving]
) -> None:
    serving = start(str(config), RAY_ADDRESS="auto")
    assert serving.end() == 1
    assert stale in serving.output
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
        serving = start(str(config), RAY_ADDRESS=address)
        assert serving.end() == 1
        assert f"no Ray cluster answers at {address}, the address in RAY_ADDRESS" in serving.output
    assert "fake serve run" not in serving.output


def crash(state: Path) -> Path:
    """Leave behind what a service on port 8000 does that has crashed."""
    (state / "servers").mkdir(parents=True)
    path = state / "servers" / "8000.json"
    path.write_text(f'{{"port": 8000, "pid": {os.getpid()}, "config": "x"}}')
    return path


def test_a_crash_leaves_nothing_that_stop_believes(state: Path) -> None:
    crash(state)
    assert running_servers() == []
    assert main(["stop"]) == 0


def test_two_who_look_at_once_do_not_take_each_other_for_a_service(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash(state)
    flock, seen = fcntl.flock, []

    def look_meanwhile(file: TextIO, operation: int) -> None:
        flock(file, operation)
        monkeypatch.setattr(fcntl, "flock", flock)
        seen.append(running_servers())

    monkeypatch.setattr(fcntl, "flock", look_meanwhile)
    assert running_servers() == []
    assert seen == [[]]


def test_who_only_looks_keeps_no_service_from_starting(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock, sleep, looked = fcntl.flock, time.sleep, threading.Event()
    path = crash(state)
    looking = path.open(encoding="utf-8")
    flock(looking, fcntl.LOCK_SH)

    def look_until_then(seconds: float) -> None:
        looking.close()
        looked.set()
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", look_until_then)
    with claim(8000) as held:
        held.record(1, path)
        assert running_servers() == [RunningServer(8000, 1, str(path))]
    assert looked.is_set()


def test_a_claim_that_has_not_started_yet_is_no_server(state: Path) -> None:
    crash(state)
    with claim(8000):
        assert running_servers() == []
        with pytest.raises(CommandError, match="already serves on port 8000"), claim(8000):
            pass
    with claim(8000):
        pass


def test_a_state_folder_that_can_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SERVE_APP_STATE", str(tmp_path / "file"))
    with pytest.raises(CommandError, match="SERVE_APP_STATE"), claim(8000):
        pass


def test_ray_is_told_of_a_share_of_the_cpus_unless_the_user_has() -> None:
    assert ray_cpus({}, 4, 4) == {}
    assert ray_cpus({}, 2, 4) == {"RAY_OVERRIDE_RESOURCES": '{"CPU": 2}'}
    assert ray_cpus({"RAY_OVERRIDE_RESOURCES": "{}"}, 2, 4) == {}
    assert ray_cpus({"RAY_USE_MULTIPROCESSING_CPU_COUNT": "1"}, 2, 4) == {}


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or (os.cpu_count() or 1) < 2, reason="needs two CPUs to lose one"
)
def test_a_service_that_may_use_one_cpu_starts_a_ray_of_one(config: Path, start: Callable[..., Serving]) -> None:
    document = yaml.safe_load(config.read_text())
    document["applications"][0]["args"] = {"ingress": {"num_cpus": 0}}
    config.write_text(yaml.safe_dump(document))
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        serving = start(str(config), program=None)
        serving.wait_for("resources ")
    finally:
        os.sched_setaffinity(0, allowed)
    assert 'resources {"CPU": 1}' in serving.output


def test_a_service_of_another_user_is_not_stopped_but_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr("serve_app.cli.stop.os.kill", kill)
    with claim(8123) as held:
        held.record(4711, Path("c.yaml"))
        assert main(["stop"]) == 1
    assert "process 4711 on port 8123 belongs to another user" in capsys.readouterr().err


def test_its_ray_has_a_folder_and_a_token_of_this_user_alone(
    config: Path, start: Callable[..., Serving], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.delenv("RAY_TMPDIR")
    with tempfile.TemporaryDirectory(prefix="sa-") as home:
        serving = start(str(config), HOME=home, TMPDIR=home)
        serving.wait_for("RAY_AUTH_MODE=token")
        private = Path(home, f"serve_app-{os.geteuid()}")
        assert f"RAY_TMPDIR={private}," in serving.output
        for path, mode in ((private, 0o700), (Path(home, ".ray", "auth_token"), 0o600)):
            assert stat.S_IMODE(path.stat().st_mode) == mode
        serving.wait_for("serve_app is ready")
        serving.process.send_signal(signal.SIGINT)
        assert serving.end() == 0


def test_a_service_whose_user_has_no_home_nor_name_starts(
    config: Path, start: Callable[..., Serving], monkeypatch: pytest.MonkeyPatch, state: Path
) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_TMPDIR", "HOME"):
        monkeypatch.delenv(name)
    with tempfile.TemporaryDirectory(prefix="sa-") as temporary:
        serving = start(str(config), TMPDIR=temporary, program=serve_app_without_user)
        serving.wait_for("serve_app is ready")
        private = Path(temporary, f"serve_app-{os.geteuid()}")
        assert f"HOME={private}," in serving.output
        serving.process.send_signal(signal.SIGINT)
        assert serving.end() == 0


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RAY_TMPDIR": "/nowhere"}, "RAY_TMPDIR /nowhere can't be written by this user"),
        (
            {"RAY_AUTH_TOKEN": "", "RAY_AUTH_TOKEN_PATH": "/nowhere"},
            "RAY_AUTH_TOKEN_PATH names /nowhere, which holds no token",
        ),
    ],
)
def test_what_is_set_wrongly_is_said_before_gigabytes_are_fetched(
    config: Path, start: Callable[..., Serving], variables: dict[str, str], said: str
) -> None:
    serving = start(str(config), **variables)
    assert serving.end() == 1
    assert said in serving.output
    assert "fetching" not in serving.output


@pytest.mark.skipif(not socket.has_ipv6, reason="needs IPv6")
def test_an_address_of_ipv6_is_served_by_the_python_proxy(
    config: Path, port: int, start: Callable[..., Serving], capsys: pytest.CaptureFixture[str]
) -> None:
    serving = start(str(config), "--host", "::1")
    serving.wait_for("RAY_SERVE_ENABLE_HA_PROXY=0,")
    serving.wait_for(f"serve_app is ready at http://[::1]:{port}")
    serving.process.send_signal(signal.SIGINT)
    assert serving.end() == 0
    refused = start(str(config), "--host", "::1", RAY_SERVE_ENABLE_HA_PROXY="1")
    assert refused.end() == 1
    assert "HAProxy can't listen on the IPv6 address ::1" in refused.output
    assert "fetching" not in refused.output
