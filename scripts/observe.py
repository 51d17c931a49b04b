"""Prometheus, and Grafana where it is installed, for a service that runs: `make observe`.

    make observe                               # http://127.0.0.1:8000
    make observe ARGS='--url http://10.0.0.5:8000 --key-file key.txt'
    python scripts/observe.py --write          # writes configs/observe/ from serve_app/observability/panels.py

Prometheus listens on 127.0.0.1:9090, Grafana on 127.0.0.1:3000. Their files are in a temporary folder.
Ctrl-C ends both.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from serve_app.observability.panels import ALERTS, PANELS, Panel

FOLDER = Path(__file__).parent.parent / "configs" / "observe"
PROMETHEUS, GRAFANA = 9090, 3000
_WIDTH, _HEIGHT, _COLUMNS = 12, 8, 2
_HOW = "Prometheus is not installed (Debian: apt install prometheus; its service need not run)."


def dashboard() -> dict[str, Any]:
    """Grafana's document of the dashboard."""
    return {
        "title": "serve_app",
        "uid": "serve-app",
        "schemaVersion": 39,
        "timezone": "browser",
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "panels": [_panel(number, panel) for number, panel in enumerate(PANELS)],
    }


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.about,
        "gridPos": {
            "x": number % _COLUMNS * _WIDTH, "y": number // _COLUMNS * _HEIGHT, "w": _WIDTH, "h": _HEIGHT
        },
        "datasource": {"type": "prometheus", "uid": "serve-app"},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + place), "expr": query.expression, "legendFormat": query.legend}
            for place, query in enumerate(panel.queries)
        ],
    }  # fmt: skip


def alerts() -> dict[str, Any]:
    """Prometheus's document of the alerts."""
    rules = [
        {
            "alert": alert.name,
            "expr": alert.expression,
            "for": alert.lasts,
            "labels": {"severity": alert.severity},
            "annotations": {"summary": alert.summary, "remedy": alert.remedy},
        }
        for alert in ALERTS
    ]
    return {"groups": [{"name": "serve_app", "rules": rules}]}


def files() -> dict[str, str]:
    """Name in `configs/observe` -> contents."""
    head = "# Written by scripts/observe.py from serve_app/observability/panels.py.\n"
    return {
        "dashboard.json": json.dumps(dashboard(), indent=2) + "\n",
        "alerts.yaml": head + yaml.safe_dump(alerts(), sort_keys=False, width=120),
    }


def prometheus_config(url: str, key_file: Path | None, rules: Path) -> dict[str, Any]:
    """Prometheus's configuration for one service."""
    parts = urlsplit(url)
    job: dict[str, Any] = {
        "job_name": "serve_app",
        "scheme": parts.scheme,
        "metrics_path": f"{parts.path.rstrip('/')}/metrics",
        "static_configs": [{"targets": [parts.netloc]}],
    }
    if key_file is not None:
        job["authorization"] = {"credentials_file": str(key_file.absolute())}
    intervals = {"scrape_interval": "10s", "evaluation_interval": "10s"}
    return {"global": intervals, "rule_files": [str(rules)], "scrape_configs": [job]}


def provision(folder: Path) -> None:
    """Write what Grafana reads at its start: the data source and the dashboard."""
    source = {
        "name": "serve_app",
        "uid": "serve-app",
        "type": "prometheus",
        "url": f"http://127.0.0.1:{PROMETHEUS}",
        "isDefault": True,
    }
    provider = {"name": "serve_app", "type": "file", "options": {"path": str(folder / "dashboards")}}
    for name, document in (
        ("datasources", {"apiVersion": 1, "datasources": [source]}),
        ("dashboards", {"apiVersion": 1, "providers": [provider]}),
    ):
        path = folder / "provisioning" / name / "serve_app.yaml"
        path.parent.mkdir(parents=True)
        path.write_text(yaml.safe_dump(document))
    (folder / "dashboards").mkdir()
    (folder / "dashboards" / "serve_app.json").write_text(json.dumps(dashboard()))


def observe(url: str, key_file: Path | None) -> int:
    """Run both programs until the first one ends or Ctrl-C."""
    prometheus = shutil.which("prometheus")
    if prometheus is None:
        print(_HOW, file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="serve-app-observe-") as name, contextlib.ExitStack() as running:
        folder = Path(name)
        rules, config = folder / "alerts.yaml", folder / "prometheus.yaml"
        rules.write_text(yaml.safe_dump(alerts()))
        config.write_text(yaml.safe_dump(prometheus_config(url, key_file, rules)))
        log = running.enter_context((folder / "log").open("w"))
        commands = [
            [prometheus, f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}",
             f"--web.listen-address=127.0.0.1:{PROMETHEUS}"],
        ]  # fmt: skip
        print(f"Prometheus: http://127.0.0.1:{PROMETHEUS}/alerts, scraping {url}/metrics")
        if (grafana := shutil.which("grafana-server")) is not None:
            provision(folder)
            commands.append(
                [grafana, "--homepath=/usr/share/grafana", f"cfg:default.paths.data={folder / 'grafana'}",
                 f"cfg:default.paths.provisioning={folder / 'provisioning'}", "cfg:default.server.http_addr=127.0.0.1",
                 f"cfg:default.server.http_port={GRAFANA}", "cfg:default.auth.anonymous.enabled=true"]
            )  # fmt: skip
            print(f"Grafana: http://127.0.0.1:{GRAFANA}/d/serve-app")
        else:
            print(f"Grafana is not installed. One that runs elsewhere takes {FOLDER / 'dashboard.json'}.")
        processes = [subprocess.Popen(command, stdout=log, stderr=log) for command in commands]
        try:
            code = processes[0].wait()
            print((folder / "log").read_text()[-2000:], file=sys.stderr)
            return code or 1
        except KeyboardInterrupt:
            return 0
        finally:
            for process in processes:
                process.send_signal(signal.SIGTERM)
            for process in processes:
                process.wait()


def main() -> int:
    """Observe a service, or write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the service")
    parser.add_argument("--key-file", type=Path, help="a file with the API key of an admin, where keys are needed")
    parser.add_argument("--write", action="store_true", help="write configs/observe/ and end")
    options = parser.parse_args()
    if options.write:
        FOLDER.mkdir(exist_ok=True)
        for name, contents in files().items():
            (FOLDER / name).write_text(contents)
        return 0
    return observe(options.url.rstrip("/"), options.key_file)


if __name__ == "__main__":
    sys.exit(main())
