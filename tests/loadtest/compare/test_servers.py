"""Servers of a comparison: ready means ready, and afterwards nothing is left, also what left the session."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import fake_openai_server
import psutil
import pytest

from loadtest.compare import servers
from loadtest.compare.accounting import ProcessTree, memory_kind, title
from loadtest.compare.servers import Command, Server, ServerFailed
from loadtest.service import free_port


def program(code: str, timeout_s: float = 10) -> Command:
    return Command([sys.executable, "-c", code], {}, "/", timeout_s)


def _until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def test_a_tree_counts_what_left_the_session_and_ends_with_its_server(tmp_path: Path) -> None:
    port = free_port()
    command = Command([sys.executable, str(Path(fake_openai_server.__file__)), str(port)], {}, "/health", 30)
    with Server(command, f"http://127.0.0.1:{port}", tmp_path / "log") as server:
        members = server.tree.members()
        assert len(members) == 2
        (child,) = [process for process in members if process.ppid() in {other.pid for other in members}]
        _until(lambda: sum(child.cpu_times()[:2]) >= 0.1)
        assert sum(server.tree.cpu_s().values()) >= 0.1
        assert 5_000_000 < server.tree.memory_bytes() <= server.tree.peak_rss_bytes()
        before = server.tree.cpu_s()
        child.kill()
        _until(lambda: child not in server.tree.members())
        after = server.tree.cpu_s()
        assert all(after[name] >= seconds for name, seconds in before.items())
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in members)


def test_a_server_of_a_job_in_the_background_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "STOP_PATIENCE_S", 600)
    port = free_port()
    command = Command([sys.executable, str(Path(fake_openai_server.__file__)), str(port)], {}, "/health", 30)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # what a shell without job control gives to `command &`
    try:
        with Server(command, f"http://127.0.0.1:{port}", tmp_path / "log"):
            pass
    finally:
        signal.signal(signal.SIGINT, before)
    assert "KeyboardInterrupt" in (tmp_path / "log").read_text()


def test_an_orphan_of_a_killed_parent_is_still_of_the_tree(tmp_path: Path) -> None:
    port = free_port()
    command = Command([sys.executable, str(Path(fake_openai_server.__file__)), str(port)], {}, "/health", 30)
    with Server(command, f"http://127.0.0.1:{port}", tmp_path / "log") as server:
        members = server.tree.members()
        (root,) = [process for process in members if process.ppid() == psutil.Process().pid]
        root.kill()
        _until(lambda: root not in server.tree.members())
        (orphan,) = server.tree.members()
        assert orphan in members
        assert orphan != root
    assert not orphan.is_running()


def test_a_server_that_ends_says_its_last_words(tmp_path: Path) -> None:
    server = Server(program("raise SystemExit('no such model')"), f"http://127.0.0.1:{free_port()}", tmp_path / "log")
    with pytest.raises(ServerFailed, match="status 1 before it was ready: no such model"), server:
        pass


def test_a_server_that_never_listens_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its time is over as soon as it has said something, however long Python takes to start."""
    code = "print('loading', flush=True); import time; time.sleep(600)"
    log = tmp_path / "log"
    log.touch()
    looks = count()

    def monotonic() -> float:
        return 100.0 if next(looks) and "loading" in log.read_text() else 0.0

    monkeypatch.setattr(servers, "time", SimpleNamespace(sleep=time.sleep, monotonic=monotonic))
    server = Server(program(code, timeout_s=1), f"http://127.0.0.1:{free_port()}", log)
    with pytest.raises(ServerFailed, match="not ready after 1 s: loading"), server:
        pass
    assert server.tree.members() == []


def test_an_error_inside_stops_the_server(tmp_path: Path) -> None:
    port = free_port()
    command = Command([sys.executable, str(Path(fake_openai_server.__file__)), str(port)], {}, "/health", 30)
    server = Server(command, f"http://127.0.0.1:{port}", tmp_path / "log")
    with pytest.raises(KeyError), server:
        raise KeyError("a defect of the harness")
    assert server.tree.members() == []


def test_a_tree_of_one_process_is_that_process() -> None:
    own = ProcessTree(psutil.Process())
    assert psutil.Process() in own.members()
    assert own.memory_bytes() > 0
    assert memory_kind() in ("PSS", "RSS")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["ray::ServeReplica:serve_app:Ingress.handle_request_streaming"], "ray::ServeReplica:serve_app:Ingress"),
        (["ray::ProxyActor", "", ""], "ray::ProxyActor"),
        (["/x/python3.11", "-m", "serve_app.cli.main", "serve"], "python3.11 serve_app.cli.main"),
        (["/x/python", "/x/bin/transformers", "serve"], "python transformers"),
        (["/x/raylet", "--port=1"], "raylet"),
        (["VLLM::EngineCore"], "VLLM::EngineCore"),
        ([], "?"),
    ],
)
def test_titles(arguments: list[str], expected: str) -> None:
    assert title(arguments) == expected
