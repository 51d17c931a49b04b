"""A real HAProxy with our launcher that is killed, and what stands in for it until the next one."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from serve_app.cli import haproxy
from serve_app.cli.haproxy import bundled_haproxy
from serve_app.cli.haproxy_standin import CONFIG, ENDED, PID
from serve_app.cli.private_folder import private_folder

pytestmark = pytest.mark.skipif(bundled_haproxy() is None, reason="ray[serve] brings no HAProxy here")
from haproxy_runner import Behind, Running, answer, running_haproxy  # noqa: E402 - needs HAProxy


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with private_folder(tmp_path / "note") as made:
        yield made


class Slow:
    """A server that begins its answer at once, and ends it when it is told."""

    def __init__(self) -> None:
        self.begun, self.may_end = threading.Event(), threading.Event()

    def __call__(self, connection: socket.socket, _: bytes) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\nConnection: close\r\n\r\nbeg")
        self.begun.set()
        self.may_end.wait()
        connection.sendall(b"end")


def well(connection: socket.socket, _: bytes) -> None:
    connection.sendall(answer(200))


def until(condition: Callable[[], object], patience_s: float = 60) -> None:
    """Look until it holds."""
    waiting = threading.Event()
    for _ in range(int(patience_s / 0.02)):
        if condition():
            return
        waiting.wait(0.02)
    raise AssertionError("it does not come to be")


def get(running: Running) -> int:
    """The status of an answer. Raises `OSError` where there is none."""
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)
    try:
        connection.request("GET", "/x")
        return connection.getresponse().status
    except http.client.HTTPException as error:
        raise ConnectionError from error
    finally:
        connection.close()


def answers(running: Running) -> bool:
    try:
        return get(running) == 200
    except OSError:
        return False


def standin(folder: Path) -> psutil.Process | None:
    """The process that serves in HAProxy's place now."""
    try:
        return psutil.Process(int((folder / PID).read_text()))
    except (OSError, ValueError, psutil.NoSuchProcess):
        return None


def watchers(folder: Path) -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if str(folder) in (line := " ".join(process.info["cmdline"] or [])) and "haproxy_standin" in line
    ]


def next_haproxy(running: Running, text: str, *more: str) -> subprocess.Popen[bytes]:
    """Another one with this configuration, started as Serve starts it: `more` of its arguments in a reload."""
    arguments = running.process.args
    assert isinstance(arguments, list)
    Path(arguments[-1]).write_text(text)
    return subprocess.Popen([*arguments, "-dR", *more], stderr=subprocess.DEVNULL)


def test_a_killed_haproxy_is_replaced_at_once_and_again_without_a_refused_connection(folder: Path) -> None:
    (port,) = haproxy._free_ports(1)
    slow = Slow()
    with running_haproxy(folder, port, None) as unready:
        knows_nothing = Path(unready.process.args[-1]).read_text()  # type: ignore[index]
    assert not watchers(folder), "there was nothing to go on with"
    with Behind(well) as behind, running_haproxy(folder, port, [behind.port]) as running:
        knows_all = Path(running.process.args[-1]).read_text()  # type: ignore[index]
        running.process.kill()
        running.process.wait()
        until(lambda: answers(running))
        first = standin(folder)
        assert first is not None
        assert os.getpgid(first.pid) != os.getpgid(0), "Ray ends the group of what started HAProxy"
        assert not connects(running.socket_path), "Serve must see that it died"
        first.kill()  # it dies, too
        until(lambda: (other := standin(folder)) is not None and other != first and answers(running))
        serving = standin(folder)
        behind.behaviour = slow
        streamed: list[bytes] = []
        reader = threading.Thread(target=lambda: streamed.append(httpx.get(f"http://127.0.0.1:{port}/s").content))
        reader.start()
        assert slow.begun.wait(60)
        behind.behaviour = well
        statuses: list[int] = []
        with next_haproxy(running, knows_nothing) as waits:  # as Serve's new actor begins
            while not connects(running.socket_path):
                statuses.append(get(running))
            assert standin(folder) == serving
            reload = "-sf", str(waits.pid), "-x", str(running.socket_path)
            with next_haproxy(running, knows_all, *reload) as serves:
                while waits.poll() is None or not connects(running.socket_path):
                    statuses.append(get(running))
                assert answers(running)
                slow.may_end.set()
                reader.join(60)
                until(lambda: standin(folder) is None)
                statuses.append(get(running))
                (folder / ENDED).touch()
                serves.kill()
        assert streamed == [b"begend"], "a stream of the stand-in is served to its end"
        assert set(statuses) == {200}
    until(lambda: not watchers(folder))


@pytest.mark.parametrize("how", ["the service is stopped", "another one has taken over", "the owner ends"])
def test_nobody_stands_in(folder: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (port,) = haproxy._free_ports(1)
    owner = subprocess.Popen(["sleep", "600"])
    monkeypatch.setattr("serve_app.cli.haproxy.os.getpid", lambda: owner.pid)
    with Behind(well) as behind, running_haproxy(folder, port, [behind.port]) as running:
        until(lambda: len(watchers(folder)) == 1)
        (watcher,) = watchers(folder)
        if how == "the service is stopped":
            (folder / ENDED).touch()
            running.process.kill()
        elif how == "another one has taken over":
            with subprocess.Popen(
                [*running.process.args, "-sf", str(running.process.pid), "-x", str(running.socket_path)]
            ) as other:
                running.process.wait()
                watcher.wait(60)
                assert standin(folder) is None
                (folder / ENDED).touch()
                other.kill()
        else:
            running.process.kill()
            until(lambda: standin(folder))
            served = standin(folder)
            owner.kill()
            owner.wait()
            assert served is not None
            served.wait(60)
        watcher.wait(60)
        assert not answers(running)
    owner.kill()
    owner.wait()


def connects(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def test_a_stand_in_is_known_by_its_configuration(folder: Path) -> None:
    """A process that has its id by now, because it died long ago, must not be told to stop."""
    (port,) = haproxy._free_ports(1)
    with subprocess.Popen(["sleep", "600"]) as other, Behind(well) as behind:
        (folder / PID).write_text(str(other.pid))
        with running_haproxy(folder, port, [behind.port]) as running:
            assert answers(running)
            (folder / ENDED).touch()
        assert other.poll() is None
        other.kill()
    assert not (folder / CONFIG).exists()
