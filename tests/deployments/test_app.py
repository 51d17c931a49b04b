"""What `build` makes of a config, and what becomes of a model that can't be loaded."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import ray
from ray import serve

from serve_app.app import build, replica_options, room_for_both
from serve_app.config import AppConfig, ReplicasConfig


def test_serve_is_told_to_validate_the_arguments() -> None:
    assert build.__annotations__["args"] is AppConfig  # a string there, and Serve would pass the bare dict


def test_a_fixed_number_of_replicas() -> None:
    replicas = ReplicasConfig(num_replicas=3, num_cpus=2, num_gpus=1, resources={"a": 0.5}, max_ongoing_requests=7)
    options = replica_options(replicas)
    assert options["num_replicas"] == 3
    assert options["ray_actor_options"] == {"num_cpus": 2, "num_gpus": 1, "resources": {"a": 0.5}}
    assert options["max_ongoing_requests"] == 7


def test_scaling_from_zero_starts_with_one() -> None:
    replicas = ReplicasConfig.model_validate({"autoscaling": {"min_replicas": 0, "max_replicas": 2}})
    scaling = replica_options(replicas)["autoscaling_config"]
    assert (scaling.min_replicas, scaling.initial_replicas, scaling.max_replicas) == (0, 1, 2)


MODEL, INGRESS = {"CPU": 2, "GPU": 1}, {"CPU": 1, "GPU": 0}


@pytest.mark.parametrize(
    ("nodes", "room"),
    [
        ([{"CPU": 3, "GPU": 1}], True),
        ([{"CPU": 2, "GPU": 1}], False),
        ([{"CPU": 2, "GPU": 1}, {"CPU": 1}], False),  # Ray may give the ingress the only place of the model
        ([{"CPU": 3, "GPU": 1}, {"CPU": 1}], True),
        ([{"CPU": 2, "GPU": 1}, {"CPU": 2, "GPU": 1}], True),
        ([{"CPU": 1, "GPU": 1}, {"CPU": 8}], False),  # enough of everything, on no single node
        ([{"CPU": 2, "GPU": 0.5}, {"CPU": 2, "GPU": 0.5}], False),
        ([{}, {}], False),
        ([], False),
    ],
)
def test_an_update_brings_one_more_only_where_a_node_has_room(nodes: list[dict[str, float]], room: bool) -> None:
    assert room_for_both(MODEL, INGRESS, nodes) is room
    assert room_for_both(INGRESS, MODEL, nodes) is room


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(("share", "percent"), [(0.01, 25), (1.01, 0)])
def test_room_is_judged_by_what_the_cluster_has_free(share: float, percent: int) -> None:
    cpus = share * ray.available_resources()["CPU"]
    config = AppConfig.model_validate({"model_server": {"num_cpus": cpus}, "ingress": {"num_cpus": 0.01}})
    ingress = build(config)
    assert ingress._bound_deployment._deployment_config.max_surge_percent == percent


@pytest.mark.ray
def test_a_model_that_can_not_be_loaded_fails_at_once(
    deployed: Callable[..., str], until: Callable[..., httpx.Response], text_folder: Path
) -> None:
    """With the first try; Serve's others are told of it and load nothing."""
    config = {"model": {"source": str(text_folder)}, "model_server": {"num_cpus": 0.1}, "ingress": {"num_cpus": 0.1}}
    url = deployed(build(AppConfig.model_validate(config)), "no-weights", wait=False)
    ready = until(f"{url}/ready", lambda response: '"failed"' in response.text)
    assert ready.status_code == 503
    assert "weights" in ready.json()["error"]
    assert "\n" not in ready.json()["error"]
    deadline = time.monotonic() + 180
    while serve.status().applications["no-weights"].status != "DEPLOY_FAILED":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    deployment = serve.status().applications["no-weights"].deployments["ModelServer"]
    assert ready.json()["error"] in deployment.message
    assert "STARTING" not in deployment.replica_states  # no further attempt; the failed one may be on its way out
    logs = Path(ray.get_runtime_context().worker.node.get_logs_dir_path())
    tries = [log.read_text() for log in logs.glob("serve/replica_no-weights_ModelServer_*.log")]
    assert len(tries) == 3, "Serve's number for one replica"
    assert sum("starting torch" in text for text in tries) == 1
