"""The environment that `serve run` is started in: one table, a reason per variable.

These must be set before Ray starts, so a config's runtime_env would be too late. What the user has set is left alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from serve_app.deployments.serve_settings import CHEAP_STREAMS

SERVER_ENVIRONMENT = {
    # Without it Ray would join the last cluster that `ray start` made on this machine, and a second server here would
    # replace the first one's application. Set RAY_ADDRESS=auto (or host:port) to serve on a running cluster.
    "RAY_ADDRESS": "local",
    # Ray reports usage to its makers by default. A service for a team's own data asks first: set it to 1 to take part.
    "RAY_USAGE_STATS_ENABLED": "0",
    # `serve-app serve` says itself when the service is ready, and how to stop it from another terminal.
    "SERVE_APP_BANNER": "0",
    **CHEAP_STREAMS,
    # Ray gives its workers the niceness 15, so that whatever else runs on the machine comes first, the client of a
    # benchmark too: at one stream on 2 cores 42 to 44 tokens a second instead of 43 to 48.
    "RAY_worker_niceness": "0",
    # A dead HTTP proxy is replaced after three looks. At Serve's own ten seconds between them it was away for 23 to
    # 32 s (loadtest/chaos.py).
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    # Serve's own servers answer with text, and wait for headers for ever.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve_app.deployments.serve_http.middlewares",
}
_NOT_SET = ("RAY_ADDRESS", "")


def server_environment(current: Mapping[str, str]) -> dict[str, str]:
    """`current` with this table's variables added where they are not set.

    An empty RAY_ADDRESS is none to Ray either, which would then join the last cluster of this machine.
    """
    return {**SERVER_ENVIRONMENT, **{name: value for name, value in current.items() if (name, value) != _NOT_SET}}


def ray_cpus(current: Mapping[str, str], usable: int, whole: int) -> dict[str, str]:
    """What tells the Ray that is started how many CPUs it has, where that is not all of the machine's.

    Ray itself knows nothing of affinities, of quotas of groups that are not a container's own, and takes half a CPU
    for none; a replica would wait for its place for ever, or be one of too many.
    """
    settled = "RAY_OVERRIDE_RESOURCES" in current or "RAY_USE_MULTIPROCESSING_CPU_COUNT" in current
    return {} if settled or usable == whole else {"RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": usable})}


def own_cluster(environment: Mapping[str, str]) -> bool:
    """Whether `serve run` will start a Ray of its own on this machine, rather than join one."""
    return environment["RAY_ADDRESS"] == "local"
