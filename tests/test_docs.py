"""What the documentation says of the code is true: fields, links, commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from configuration_page import PAGE, page

from serve_app.cli.environment import SERVER_ENVIRONMENT
from serve_app.cli.main import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_configuration_page_is_made_from_the_config() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python tests/support/configuration_page.py"


def test_every_field_is_explained() -> None:
    assert re.findall(r"^.*\|  \|$", page(), re.MULTILINE) == []


@pytest.mark.parametrize("document", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", PAGES, ids=lambda path: path.name)
def test_files_and_commands_that_are_named_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for path in re.findall(r"\b(?:configs|docs|constraints|serve_app|tests|loadtest)/[\w./-]+\.\w+", text):
        assert (ROOT / path).exists(), path
    for command in re.findall(r"^\$? *serve-app (\w+)", text, re.MULTILINE):
        assert command in COMMANDS, command


def test_what_serve_app_serve_sets_is_told_to_those_who_start_ray_themselves() -> None:
    operations = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    cluster = (ROOT / "configs/serve.cluster.yaml").read_text(encoding="utf-8")
    for name, value in SERVER_ENVIRONMENT.items():
        assert f"| `{name}` | `{value}` |" in operations
        if name.startswith(("RAY_SERVE_", "RAY_worker_")):  # of Ray's processes on every node
            assert f"{name}={value} " in cluster
