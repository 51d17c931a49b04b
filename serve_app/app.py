"""Wires the deployments together: `import_path: serve_app.app:build` in a Serve config; its `args` are an `AppConfig`.

`build` fetches, loads and opens nothing. Serve calls it in a process of its own, once per deploy.
"""

# No `from __future__ import annotations`: Serve reads the annotation of `args` to make an AppConfig of the YAML.

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig

from serve_app.config import AppConfig, ReplicasConfig
from serve_app.demo_config import demo_arguments
from serve_app.deployments.dispatch.router import ModelRouter
from serve_app.deployments.ingress import Ingress
from serve_app.deployments.model_server import ModelServer
from serve_app.deployments.ray_internals import free_resources

HEALTH_CHECK_PERIOD_S = 2.0
"""Serve replaces a replica after three failed checks, or after one if its process is dead. A check costs 1 ms."""
HEALTH_CHECK_TIMEOUT_S = 10.0
"""Serve replaces a frozen or cut-off replica after three such timeouts. Its streams leave it after 5 s already."""
SURGE_PERCENT = 25
"""Extra replicas during an update. Serve rounds up: one extra for up to four replicas, two for up to eight."""

Resources = Mapping[str, float]
"""Name of a Ray resource -> amount."""


def build(args: AppConfig) -> serve.Application:
    """The application of one config: an ingress in front of a model server."""
    surge_percent = SURGE_PERCENT if _room_for_one_more(args) else 0
    health = {"health_check_period_s": HEALTH_CHECK_PERIOD_S, "health_check_timeout_s": HEALTH_CHECK_TIMEOUT_S}
    model_server = serve.deployment(
        name="ModelServer",
        **replica_options(args.model_server, surge_percent) | health,
        request_router_config={
            "request_router_class": f"{ModelRouter.__module__}.ModelRouter",
            "request_router_kwargs": {
                "shared": args.ingress.may_be_several,
                "places": args.engine.max_running,
            },
        },
    )(ModelServer)
    # `max_constructor_retry_count` keeps Serve's default. During an update each death of a new version's replica counts
    # as a try, and after the last try Serve replaces no replica any more: with a single try, a kill in an update was an
    # outage until the next deploy. A model that a replica has refused fails at once in later tries.
    ingress = serve.deployment(name="Ingress", **replica_options(args.ingress, surge_percent) | health)(Ingress)
    return ingress.bind(args, model_server.bind(args))


def demo(args: dict[str, Any]) -> serve.Application:
    """The demo's application, for `serve run serve_app.app:demo` anywhere; `args` replace sections of its config."""
    return build(AppConfig.model_validate({**demo_arguments(), **args}))


def _room_for_one_more(args: AppConfig) -> bool:
    """Whether one more replica of each deployment is sure to fit into what the cluster's nodes have free now.

    True without a cluster, as in a check of a config. Nodes that an autoscaler would add do not count: set
    `max_surge_percent` to use them.
    """
    if not ray.is_initialized():
        return True
    return room_for_both(_needs(args.model_server), _needs(args.ingress), free_resources())


def room_for_both(one: Resources, other: Resources, free_by_node: Sequence[Resources]) -> bool:
    """Whether both replicas find a node, in either order and on whichever node Ray places the first.

    The sum over all nodes does not tell. If a new replica fits on no single node, an update waits for ever: the new
    ingress waits for the new model, and the old replicas keep their resources until the new ones are up.
    """

    def second_fits_wherever_first_is(first: Resources, second: Resources) -> bool:
        places = [node for node in free_by_node if _fits(first, node)]
        return bool(places) and all(
            _fits(Counter(first) + Counter(second), node)
            or any(_fits(second, another) for another in free_by_node if another is not node)
            for node in places
        )

    return second_fits_wherever_first_is(one, other) and second_fits_wherever_first_is(other, one)


def _needs(replicas: ReplicasConfig) -> Resources:
    return {"CPU": replicas.num_cpus, "GPU": replicas.num_gpus} | replicas.resources


def _fits(needs: Resources, free: Resources) -> bool:
    return all(free.get(resource, 0.0) >= need for resource, need in needs.items() if need > 0)


def replica_options(replicas: ReplicasConfig, surge_percent: int = 0) -> dict[str, Any]:
    """`replicas` as options of a Serve deployment; `surge_percent` applies if its `max_surge_percent` is not set."""
    same_names = {"max_ongoing_requests", "max_queued_requests", "graceful_shutdown_timeout_s"}
    options = replicas.model_dump(include=same_names) | {
        "ray_actor_options": replicas.model_dump(include={"num_cpus", "num_gpus", "resources"}),
        "max_surge_percent": surge_percent if replicas.max_surge_percent is None else replicas.max_surge_percent,
    }
    scaling = replicas.autoscaling
    if scaling is None:
        return options | {"num_replicas": replicas.num_replicas or 1}
    return options | {
        "autoscaling_config": AutoscalingConfig(
            # One replica starts even if the minimum is 0: the ingresses need the model's card, and a mistake in the
            # config has to show now and not at the first request.
            initial_replicas=max(1, scaling.min_replicas),
            **scaling.model_dump(),
        )
    }
