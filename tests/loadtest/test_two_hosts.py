"""What a run on two hosts tells Ray, the firewall and the reader; the run itself needs root and minutes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from loadtest.hosts import BETWEEN_HOSTS, EPHEMERAL, GCS_PORT, RAY_PORTS
from loadtest.two_hosts import CLUSTER_ENVIRONMENT, CONFIG, PUBLIC_PORTS, Phase, cluster_config, table
from serve_app.config import AppConfig

OPERATIONS = Path("docs/operations.md")


def test_the_config_is_the_one_for_clusters_made_small() -> None:
    given, made = yaml.safe_load(CONFIG.read_text()), cluster_config()
    assert made.keys() == given.keys()
    assert made["http_options"] == given["http_options"]
    assert made["grpc_options"] == given["grpc_options"]
    config = AppConfig.model_validate(made["applications"][0]["args"])
    assert config.engine.batch_invariant
    assert config.model_server.num_replicas == 2
    assert [given["http_options"]["port"], given["grpc_options"]["port"]] == list(PUBLIC_PORTS)


def test_the_environment_is_what_the_config_says() -> None:
    said = dict(re.findall(r"(RAY_\w+)=(\S+)", re.sub(r"\\\n#", "", CONFIG.read_text())))
    assert said == CLUSTER_ENVIRONMENT


@pytest.mark.parametrize("port", [GCS_PORT, *RAY_PORTS.values(), *EPHEMERAL])
def test_the_firewall_lets_through_what_ray_is_told(port: int) -> None:
    ranges = [tuple(map(int, entry.split("-"))) for entry in BETWEEN_HOSTS]
    assert any(bounds[0] <= port <= bounds[-1] for bounds in ranges)


def test_the_operators_page_lists_the_same_ports() -> None:
    section = OPERATIONS.read_text().partition("### Ports between nodes")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| (\d[\d-]*) \|", section, re.MULTILINE)
    assert listed == [*BETWEEN_HOSTS]
    for option, port in RAY_PORTS.items():
        assert f"{option}={port}" in section


def test_without_root_or_namespaces_the_script_says_that_it_is_skipped(tmp_path: Path) -> None:
    """With no `ip` on the PATH it can't make any."""
    script = Path("loadtest/two_hosts.sh")
    for program in ("uname", "dirname", "bash"):
        (tmp_path / program).symlink_to(f"/usr/bin/{program}")
    done = subprocess.run(
        ["/usr/bin/env", "bash", str(script)],
        env={"PATH": str(tmp_path), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("skipped: ")


def test_the_table_has_a_line_for_each_fault() -> None:
    text = table([Phase("link cut", 24, 24, 9, 5.7, 80.0), Phase("none", 24, 24)])
    assert "| link cut | 24 | 24 | 9 | 5.7 s | 80.0 s |" in text
    assert len(text.splitlines()) == 4
