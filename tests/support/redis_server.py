"""Redis of the tests' own, a server or a cluster of three: on free ports of loopback, in memory."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from redis import Redis

BUS = 10_000
"""A cluster's nodes talk to each other on a port that is so much higher than the one for clients."""
SLOTS = 16_384


@contextmanager
def redis_server() -> Iterator[str]:
    """Its URL. Skips the test where no `redis-server` is installed."""
    with _running() as port:
        yield f"redis://127.0.0.1:{port}/0"


@contextmanager
def redis_cluster() -> Iterator[list[str]]:
    """The URLs of three nodes, each with a third of the slots. Skips the test where no `redis-server` is installed."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="redis-cluster-")))
        ports = [stack.enter_context(_running(folder / str(number))) for number in range(3)]
        nodes = [stack.enter_context(Redis("127.0.0.1", port, decode_responses=True)) for port in ports]
        for number, node in enumerate(nodes):
            first, last = (SLOTS * n // 3 for n in (number, number + 1))
            node.execute_command("CLUSTER ADDSLOTS", *range(first, last))
            # As `redis-cli --cluster create` does. Nodes that start with the same epoch get new ones one after the
            # other. Until then the old owner of a slot may claim it back from the node to which it moves, and the keys
            # are lost.
            node.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
            node.execute_command("CLUSTER MEET", "127.0.0.1", ports[0])
        _wait(lambda: all(_knows_all(node) for node in nodes), "the cluster's nodes do not find each other")
        yield [f"redis://127.0.0.1:{port}/0" for port in ports]


def _knows_all(node: Redis) -> bool:
    state = node.execute_command("CLUSTER INFO")
    if not isinstance(state, dict):
        state = dict(line.split(":") for line in state.split())
    return (state["cluster_state"], int(state["cluster_size"])) == ("ok", 3)


@contextmanager
def _running(cluster_folder: Path | None = None) -> Iterator[int]:
    """The port of a server; with a folder for its notes, one that is to be a cluster's node."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not installed (Debian: apt install redis-server)")
    port = _free_port(of_cluster=cluster_folder is not None)
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    if cluster_folder is not None:
        cluster_folder.mkdir()
        command += ["--cluster-enabled", "yes", "--dir", str(cluster_folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        _wait(lambda: _listens(process, port), "redis-server does not listen")
        yield port
    finally:
        process.terminate()
        process.wait(timeout=10)


def _free_port(*, of_cluster: bool) -> int:
    while True:
        with ExitStack() as probes:
            port = _bound(probes, 0)
            if not of_cluster:
                return port
            try:
                if port + BUS < 2**16:
                    _bound(probes, port + BUS)
                    return port
            except OSError:
                continue


def _bound(probes: ExitStack, port: int) -> int:
    probe = probes.enter_context(socket.socket())
    probe.bind(("127.0.0.1", port))
    return int(probe.getsockname()[1])


def _listens(process: subprocess.Popen[bytes], port: int) -> bool:
    assert process.poll() is None, "redis-server ended at once"
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _wait(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.02)
