"""The session's Ray cluster, for the tests marked `ray`: one, small, HTTP on loopback, started when first asked for.

Property tests draw the same examples in each run. `pytest --hypothesis-profile=explore` draws others, and
more of them: a test that asks for a number of its own says both (`exploring.cases`).
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from ray_folder import private_ray_folder

# Before anything imports torch: else its OpenMP threads spin where they wait for each other. Beside another busy
# process, tests of a model's steps took seven times as long (2 cores).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

pytest_plugins = ["chat_tokenizer", "missing_programs", "reruns", "triton_interpreter", "worker_groups"]

# Without limits of time: a machine that stalls for a moment says nothing of what is tested.
settings.register_profile("explore", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=500)
settings.register_profile("repeat", settings.get_profile("explore"), derandomize=True, print_blob=True, max_examples=40)
settings.load_profile("repeat")


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder of all processes that run the tests: the CPU kernels in it take 15 s to compile."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared-cache"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def kernel_folder(shared_cache: Path) -> Path:
    """The folder in `shared_cache` where a service keeps its CPU kernels."""
    return shared_cache / "kernels"


@dataclass(frozen=True)
class Cluster:
    """A running Ray Serve. Each application of a test has a route prefix of its own."""

    base_url: str
    grpc: str
    """`host:port` of gRPC. A call names its application in the metadata `application`."""

    def url(self, app_name: str) -> str:
        """Where the application deployed under `/app_name` answers."""
        return f"{self.base_url}/{app_name}"


@pytest.fixture(scope="session")
def ray_folder() -> Iterator[Path]:
    """Ray's folder of this session, which the user's own programs don't look into."""
    with private_ray_folder() as folder:
        yield folder


@pytest.fixture(scope="session")
def cluster(ray_folder: Path) -> Iterator[Cluster]:
    """Ray with 4 logical CPUs and Serve's proxy on free ports."""
    # Ray listens on the machine's own address. A token of our own: no file in the home folder of who runs the tests.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # As `serve-app serve` has it: at Ray's default of 15 whatever runs beside, such as other tests, would go first.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Replicas import the tests' stand-ins.
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parent / "support"), os.environ.get("PYTHONPATH", "")]
    )
    import ray
    from ray import serve
    from ray.serve._private import client

    client.CLIENT_POLLING_INTERVAL_S = 0.1  # how often `serve.run` and `serve.delete` look; 1 s of its own
    ray.init(
        address="local",  # not a cluster that somebody else has on this machine
        num_cpus=4,
        num_gpus=0,
        resources={"a_place_for_a_replica": 1},  # a test of another node says where its replicas may go
        object_store_memory=100 * 2**20,
        include_dashboard=False,
        _system_config={"metrics_report_interval_ms": 500},
    )
    port, grpc_port = free_port(), free_port()
    # All nodes that a test adds are this machine, and could not each have a proxy on that port.
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": "127.0.0.1", "port": port},
        grpc_options={
            "port": grpc_port,
            "grpc_servicer_functions": ["serve_app.api.grpc.services.add_services"],
        },
    )
    try:
        yield Cluster(f"http://127.0.0.1:{port}", f"127.0.0.1:{grpc_port}")
    finally:
        serve.shutdown()
        ray.shutdown()


@pytest.fixture(scope="module")
def deployed(cluster: Cluster) -> Iterator[Callable[..., str]]:
    """`deployed(app, name)` runs an application at /name and returns its URL; the module's last test takes it away."""
    from ray import serve

    names: list[str] = []

    def deploy(app: serve.Application, name: str, *, wait: bool = True) -> str:
        names.append(name)
        target = serve.RunTarget(app, name=name, route_prefix=f"/{name}")
        serve.run_many([target], wait_for_applications_running=wait)
        return cluster.url(name)

    yield deploy
    for name in names:  # all at once: each takes what its replicas take to end
        serve.delete(name, _blocking=False)
    for name in names:
        serve.delete(name)
