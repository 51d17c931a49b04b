"""Settings of Serve that make a streamed token cheap. They must be in the environment before Ray starts.

`serve-app serve` sets them; whoever starts Ray otherwise is told which are missing.
"""

from __future__ import annotations

CHEAP_STREAMS = {
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}
"""Fewer hops between Serve's threads and processes for each streamed token. Together they lifted the demo model's
service from 59 to 80 % of the engine's own rate to 90 % and more, at 8 streams on 2 cores (loadtest/bench.py).
RAY_SERVE_THROUGHPUT_OPTIMIZED would set them too, and would silence the log and change how requests enter."""


def missing() -> list[str]:
    """`NAME=value` of each that this process's Serve runs without."""
    from serve_app.deployments.ray_internals import serve_setting  # imports ray: too slow for the command line

    def has(name: str, value: str) -> bool:
        wanted = value == "1"
        return serve_setting(name, otherwise=wanted) == wanted  # one that a later Serve no longer knows is not missing

    return [f"{name}={value}" for name, value in CHEAP_STREAMS.items() if not has(name, value)]
