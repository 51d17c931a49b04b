"""Whoever starts Ray without the settings that make streams cheap is told which are missing."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from serve_app.cli.environment import server_environment
from serve_app.deployments.serve_settings import CHEAP_STREAMS

PROGRAM = "from serve_app.deployments.serve_settings import missing; print(*missing())"


def missing_in(environment: dict[str, str]) -> list[str]:
    """In a process of its own: Serve reads them when it is imported."""
    run = [sys.executable, "-c", PROGRAM]
    return subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout.split()


@pytest.fixture
def bare() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_SERVE_")}


def test_plain_serve_lacks_all_and_serve_app_serve_none(bare: dict[str, str]) -> None:
    assert missing_in(bare) == [f"{name}={value}" for name, value in CHEAP_STREAMS.items()]
    assert missing_in(server_environment(bare)) == []


def test_only_what_is_missing_is_named(bare: dict[str, str]) -> None:
    name, value = next(iter(CHEAP_STREAMS.items()))
    assert name not in " ".join(missing_in(bare | {name: value}))
    assert missing_in(bare | {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}) == [], "that sets them too"
