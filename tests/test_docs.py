"""What the documentation says of the code is true: fields, links, commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from configuration_page import PAGE, page

from serve_app.cli.environment import SERVER_ENVIRONMENT
from serve_app.cli.main import COMMANDS
from serve_app.observability import metrics

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), ROOT / "loadtest/README.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = sorted(path for folder in ("serve_app", "loadtest", "tests") for path in (ROOT / folder).rglob("*.py"))
README_LINES = 150


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(document: Path) -> set[str]:
    """What links to the headings of a page end with, as GitHub makes it."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_configuration_page_is_made_from_the_config() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python tests/support/configuration_page.py"


def test_every_field_is_explained() -> None:
    assert re.findall(r"^.*\|  \|$", page(), re.MULTILINE) == []


@pytest.mark.parametrize("document", PAGES, ids=_name)
def test_links_lead_somewhere(document: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", document.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        page = document.parent / target if target else document
        assert page.exists(), target
        if anchor:
            assert anchor in anchors(page), f"{target}#{anchor}"


@pytest.mark.parametrize("document", PAGES, ids=_name)
def test_files_and_commands_that_are_named_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for path in re.findall(r"\b(?:configs|docs|constraints|serve_app|tests|loadtest)/[\w./-]+\.\w+", text):
        # What a program writes is not there yet.
        assert (ROOT / path).exists() or path.startswith("loadtest/results/"), path
    for command in re.findall(r"^\$? *serve-app (\w+)", text, re.MULTILINE):
        assert command in COMMANDS, command


@pytest.mark.parametrize("document", PAGES, ids=_name)
def test_modules_that_are_named_exist(document: Path) -> None:
    """`engine/core.py` is short for `serve_app/engine/core.py`; a name alone may be in the folder of the page."""
    for name in re.findall(r"`([\w/]+\.py)`", document.read_text(encoding="utf-8")):
        assert any((folder / name).exists() for folder in (ROOT, ROOT / "serve_app", document.parent)), name


@pytest.mark.parametrize("document", PAGES, ids=_name)
def test_measuring_programs_that_are_named_exist(document: Path) -> None:
    for name in re.findall(r"python -m (loadtest(?:\.\w+)+)", document.read_text(encoding="utf-8")):
        path = ROOT.joinpath(*name.split("."))
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), name


@pytest.mark.parametrize("document", PAGES, ids=_name)
def test_pages_name_no_issue_and_no_promise_that_is_not_made(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert re.findall(r"\bissues? #?\d", text) == []
    assert set(re.findall(r"\bP\d\b", text)) <= promises()


def promises() -> set[str]:
    """The names of the promises in the design."""
    return set(re.findall(r"^\| (P\d) \|", (ROOT / "docs/design.md").read_text(encoding="utf-8"), re.MULTILINE))


def test_the_design_makes_each_promise_that_the_code_cites() -> None:
    assert promises() == {f"P{number}" for number in range(1, 9)}
    for path in CODE:
        cited = re.findall(r"\((P\d(?:, P\d)*)\)", path.read_text(encoding="utf-8"))
        assert {name for names in cited for name in names.split(", ")} <= promises(), path


def test_pages_that_the_code_cites_exist() -> None:
    for path in [*CODE, *sorted((ROOT / "configs").glob("*.yaml")), ROOT / "Makefile"]:
        for cited in re.findall(r"(?<![/\w])docs/\w+\.md", path.read_text(encoding="utf-8")):
            assert (ROOT / cited).exists(), f"{path}: {cited}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < README_LINES


def test_the_readme_leads_to_every_page() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "docs").glob("*.md"):
        assert f"](docs/{path.name}" in readme, path.name


def test_the_runbook_explains_every_metric() -> None:
    operations = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    names = [value.name for value in vars(metrics).values() if isinstance(value, metrics.Metric)]
    assert [name for name in names if f"`{name}`" not in operations] == []


def test_what_serve_app_serve_sets_is_told_to_those_who_start_ray_themselves() -> None:
    operations = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    cluster = (ROOT / "configs/serve.cluster.yaml").read_text(encoding="utf-8")
    for name, value in SERVER_ENVIRONMENT.items():
        assert f"| `{name}` | `{value}` |" in operations
        if name.startswith(("RAY_SERVE_", "RAY_worker_")):  # of Ray's processes on every node
            assert f"{name}={value} " in cluster
