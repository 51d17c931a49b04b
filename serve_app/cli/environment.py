"""The environment that `serve run` is started in: one table, a reason per variable.

These must be set before Ray starts, so a config's runtime_env would be too late. What the user has set is left alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from serve_app.deployments.serve_settings import CHEAP_STREAMS

_GRPC_MESSAGE_BYTES = str(64 * 2**20)

SERVER_ENVIRONMENT = {
    # Without it Ray would join the last cluster that `ray start` made on this machine, and a second server here would
    # replace the first one's application. Set RAY_ADDRESS=auto (or host:port) to serve on a running cluster.
    "RAY_ADDRESS": "local",
    # Ray reports usage to its makers by default. Here it does so only when the user sets this to 1.
    "RAY_USAGE_STATS_ENABLED": "0",
    # `serve-app serve` says itself when the service is ready, and how to stop it from another terminal.
    "SERVE_APP_BANNER": "0",
    **CHEAP_STREAMS,
    # Ray gives its workers niceness 15, so that all other processes come first, also a benchmark's client: with one
    # stream on 2 cores 42 to 44 tokens a second instead of 43 to 48.
    "RAY_worker_niceness": "0",
    # Serve replaces a dead HTTP proxy after three health checks. With Serve's default of 10 s between checks, the proxy
    # was away for 23 to 32 s (loadtest/chaos.py).
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    # By default a client's gRPC message may have 2 GiB, and one between Serve's processes 4 MiB. Messages are checked
    # against `api.max_body_bytes` once they are there.
    "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": _GRPC_MESSAGE_BYTES,
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": _GRPC_MESSAGE_BYTES,
    # By default Serve's own HTTP servers send errors as plain text, and wait for headers without a limit. Its gRPC
    # servers listen on all addresses.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve_app.deployments.serve_http.middlewares",
}
_NOT_SET = ("RAY_ADDRESS", "")


def server_environment(current: Mapping[str, str]) -> dict[str, str]:
    """`current` with this table's variables added where they are not set.

    An empty RAY_ADDRESS counts as not set here. So it does to Ray, which would join the last cluster of this machine.
    """
    return {**SERVER_ENVIRONMENT, **{name: value for name, value in current.items() if (name, value) != _NOT_SET}}


def ray_cpus(current: Mapping[str, str], usable: int, whole: int) -> dict[str, str]:
    """The variable that tells a new Ray its number of CPUs; empty where all of the machine's are usable.

    Ray itself ignores CPU affinity and the quotas of cgroups other than a container's own, and counts half a CPU as
    none. Then a replica would wait for a CPU forever, or there would be too many replicas.
    """
    settled = "RAY_OVERRIDE_RESOURCES" in current or "RAY_USE_MULTIPROCESSING_CPU_COUNT" in current
    return {} if settled or usable == whole else {"RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": usable})}


def own_cluster(environment: Mapping[str, str]) -> bool:
    """Whether `serve run` will start a Ray of its own on this machine, rather than join one."""
    return environment["RAY_ADDRESS"] == "local"
