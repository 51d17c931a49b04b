"""A node that is drained while streams run on it: they are on another one before its deadline, none of them cut."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from fake_model_server import CARD, FakeModelServer
from ray import serve
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from running_streams import Service, flowing, going_on, moves

from serve_app.cli.ray_address import address_file
from serve_app.config import AppConfig
from serve_app.deployments.ray_internals import free_resources
from serve_app.generation.attempt_history import FailoverSettings

pytestmark = pytest.mark.ray

GRACES_S = {"drain-start-first": 5.0, "drain-stop-first": 600.0}
"""Application -> how long its replicas may take to end. Serve stops one so long before its node's deadline at the
latest: the first after its successor has come up, the second at once."""
PLACE = "a_place_for_a_replica"
"""A resource: the session's node has one, and each node that joins."""
TOKENS = 30_000
"""Ten minutes. The test says itself when it has seen enough."""
NOTICE_S = 60.0


class Occupant:
    """An actor that takes the place of the session's node."""

    def here(self) -> None:
        return


@pytest.fixture(scope="module")
def occupant(cluster: Any) -> Any:
    occupant = ray.remote(Occupant).options(num_cpus=0, resources={PLACE: 1}).remote()
    ray.get(occupant.here.remote())
    return occupant


@pytest.fixture(scope="module")
def node(occupant: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The id of a node that joins the session's cluster, and is gone with the module."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=0", "--num-gpus=0"]
    command += [f"--address={ray.get_runtime_context().gcs_address}", f'--resources={{"{PLACE}": 1}}']
    command += ["--object-store-memory=80000000", "--min-worker-port=0", "--max-worker-port=0"]
    log = tmp_path_factory.mktemp("node") / "log"
    with log.open("w") as output:
        joining = psutil.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 60
        here = ray.get_runtime_context().get_node_id()
        while not (joined := [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]):
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield joined[0]
    finally:
        family = [joining, *joining.children(recursive=True)]
        joining.terminate()
        _, left = psutil.wait_procs(family, timeout=10)
        for process in left:
            process.kill()


def test_the_users_own_programs_find_no_address_of_this_cluster(node: str, ray_folder: Path) -> None:
    ours = ray.get_runtime_context().gcs_address
    noted = address_file(os.environ)
    deadline = time.monotonic() + 60
    while not (noted.exists() and noted.read_text() == ours):  # `ray start` notes it once the node has joined
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert noted.is_relative_to(ray_folder)
    users = address_file({name: value for name, value in os.environ.items() if name != "RAY_TMPDIR"})
    assert not users.exists() or users.read_text() != ours


def application(grace_s: float, enough: Path) -> serve.Application:
    deployment = serve.deployment(FakeModelServer).options(
        name="ModelServer",
        max_ongoing_requests=32,
        ray_actor_options={"num_cpus": 0, "resources": {PLACE: 0.5}},
        graceful_shutdown_timeout_s=grace_s,
        graceful_shutdown_wait_loop_s=0.2,
        request_router_config={"request_router_class": "serve_app.deployments.dispatch.router.ModelRouter"},
    )
    return deployment.bind(AppConfig(), 0.02, enough=enough)


def drain(node_id: str) -> None:
    """What `ray drain-node` does, and an autoscaler whose cloud takes a node back."""
    deadline_ms = int((time.time() + NOTICE_S) * 1000)
    preempted = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    gcs = ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
    accepted, why_not = gcs.drain_node(node_id, preempted, "the cloud wants it back", deadline_ms)
    assert accepted, why_not


async def test_streams_leave_a_node_that_is_drained(
    node: str, occupant: Any, deployed: Callable[..., str], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    enough = tmp_path / "enough"
    for name, grace_s in GRACES_S.items():
        await asyncio.to_thread(deployed, application(grace_s, enough), name)
    start_first, stop_first = services = [Service(name) for name in GRACES_S]
    assert [await service.each("node") for service in services] == [{node}] * 2
    ray.kill(occupant)
    places = len(free_resources())
    streams = [stream for service in services for stream in service.start(4, TOKENS)]
    await flowing(streams)
    with caplog.at_level(logging.WARNING, "serve_app.generation.attempts"):
        drain(node)
        began = time.monotonic()
        while not all(moves(caplog, streams)):
            assert time.monotonic() - began < NOTICE_S
            assert await start_first.client.model() == CARD
            (short,) = start_first.start(1, 3)  # its replica takes new work until the next one does
            await short.done
            assert short.tokens == short.expected
            await asyncio.sleep(0.2)
        await going_on(streams)
        enough.touch()
    for stream in streams:
        await stream.done
        assert stream.failure is None
        assert stream.tokens == stream.expected[: len(stream.tokens)]
    assert moves(caplog, streams) == [1] * 8
    assert max(stream.longest_pause_s for stream in streams) < FailoverSettings().silence_s, "it did not have to die"
    here = ray.get_runtime_context().get_node_id()
    assert [await service.each("node") for service in services] == [{here}] * 2
    assert len(free_resources()) == places - 1, "an update must not count on room that is going"
    assert await stop_first.client.model() == CARD
