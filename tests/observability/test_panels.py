"""The dashboard and the alerts: what they ask for exists, and the files are those of the source."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from scripts import observe
from serve_app.observability.metrics import METRICS
from serve_app.observability.panels import ALERTS, PANELS

ROOT = Path(__file__).parents[2]

NAMES = {metric.name: metric for metric in METRICS}
EXPRESSIONS = [
    *((panel.title, query.expression) for panel in PANELS for query in panel.queries),
    *((alert.name, alert.expression) for alert in ALERTS),
]


@pytest.mark.parametrize(("title", "expression"), EXPRESSIONS)
def test_what_it_asks_for_is_a_metric_of_that_kind(title: str, expression: str) -> None:
    found = re.findall(r"(serve_app_\w+?)(_total|_bucket)?\b(?![a-z_])", expression)
    assert found, title
    for name, suffix in found:
        assert name in NAMES, name
        assert (suffix == "_bucket") is bool(NAMES[name].boundaries), name
        rated = re.search(rf"(?:rate|increase)\({name}{suffix}", expression) is not None
        assert rated is (suffix != ""), f"{name}: a gauge has no rate, and all else is asked for by it"


@pytest.mark.parametrize(("title", "expression"), EXPRESSIONS)
def test_its_labels_are_labels_of_the_metric(title: str, expression: str) -> None:
    metrics = [NAMES[name] for name, _ in re.findall(r"(serve_app_\w+?)(_total|_bucket)?\b(?![a-z_])", expression)]
    of_serve = {"replica", "deployment", "application", "le"}
    for names in re.findall(r"by \(([^)]*)\)", expression):
        for name in re.split(r",\s*", names):
            assert all(name in {*metric.tag_keys, *of_serve} for metric in metrics), (title, name)


@pytest.mark.parametrize("name", ["dashboard.json", "alerts.yaml"])
def test_the_files_are_written_from_it(name: str) -> None:
    assert (ROOT / "configs" / "observe" / name).read_text() == observe.files()[name], (
        "run: python scripts/observe.py --write"
    )


def test_no_panel_lies_over_another() -> None:
    panels = json.loads(observe.files()["dashboard.json"])["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) == len(PANELS)
    taken = [(panel["gridPos"]["x"] // 12, panel["gridPos"]["y"] // 8) for panel in panels]
    assert len(set(taken)) == len(panels)


def test_prometheus_asks_the_service_itself(tmp_path: Path) -> None:
    key = tmp_path / "key"
    [job] = observe.prometheus_config("https://chat.example/prefix/", key, tmp_path / "rules")["scrape_configs"]
    assert (job["scheme"], job["metrics_path"]) == ("https", "/prefix/metrics")
    assert job["static_configs"] == [{"targets": ["chat.example"]}]
    assert job["authorization"] == {"credentials_file": str(key)}
    assert "authorization" not in observe.prometheus_config("http://127.0.0.1:8000", None, key)["scrape_configs"][0]


def test_without_prometheus_it_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(observe.shutil, "which", lambda name: None)
    assert observe.observe("http://127.0.0.1:8000", None) == 1
    assert "apt install prometheus" in capsys.readouterr().err
