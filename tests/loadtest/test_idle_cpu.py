"""Whose process it is, and what the CPU times of two looks mean."""

from __future__ import annotations

import os
import time

import psutil
import pytest

from loadtest.bare_app import build
from loadtest.idle_cpu import BARE, OTHER, OURS, cpu_seconds, role_of, shares, table
from serve_app.config import AppConfig


@pytest.mark.parametrize(
    ("command", "role"),
    [
        ("ray::ServeReplica:serve_app:ModelServer", "model replica"),
        ("ray::ServeReplica:serve_app:Ingress.handle_request", "ingress replica"),
        ("ray::ServeController.listen_for_change", "Serve's controller"),
        ("/x/bin/python -m ray.serve.scripts run a.yaml", "`serve run`"),
        ("/x/ray/core/src/ray/raylet/raylet --raylet_socket_name=/tmp/a", "Ray's raylet"),
        ("/x/gcs/gcs_server --log_dir=/tmp/a", "Ray's GCS"),
        ("/x/python -u /x/ray/dashboard/agent.py --node-ip", "Ray's dashboard and agents"),
        ("ray::IDLE", OTHER),
    ],
)
def test_roles(command: str, role: str) -> None:
    assert role_of(command) == role


def test_shares_of_a_core() -> None:
    before = {1: ("model replica", 10.0), 2: (OTHER, 5.0)}
    after = {1: ("model replica", 10.6), 3: ("model replica", 0.3)}
    assert shares(before, after, 60.0) == pytest.approx({"model replica": 0.015})


def test_a_process_that_works_is_seen_working() -> None:
    itself = [psutil.Process(os.getpid())]
    before = cpu_seconds(itself)
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass
    assert sum(shares(before, cpu_seconds(itself), 1.0).values()) >= 0.15


def test_the_table_says_what_is_ours() -> None:
    rows = table({BARE: {"model replica": 0.02, "Ray's GCS": 0.01}, OURS: {"model replica": 0.025}}).splitlines()
    assert rows[2] == "| model replica | 2.00 | 2.50 | +0.50 |"
    assert rows[-2] == "| **the replicas together** | 2.00 | 2.50 | +0.50 |"
    assert rows[-1] == "| **everything** | 3.00 | 2.50 | -0.50 |"


def test_the_bare_application_has_our_deployments() -> None:
    app = build(AppConfig.model_validate({"ingress": {"num_replicas": 2}}))
    assert app._bound_deployment.name == "Ingress"
    assert app._bound_deployment.num_replicas == 2
