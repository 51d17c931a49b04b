"""The files of others are those that the manifest names, unchanged, with their licences."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

VENDOR = Path(__file__).parents[2] / "serve_app" / "ui" / "vendor"
OURS = {"manifest.json", "README.md"}


def packages() -> list[dict[str, Any]]:
    read: list[dict[str, Any]] = json.loads((VENDOR / "manifest.json").read_text(encoding="utf-8"))
    return read


@pytest.mark.parametrize("package", packages(), ids=lambda package: package["package"])
def test_the_files_of_a_package_are_unchanged(package: dict[str, Any]) -> None:
    for name, digest in package["files"].items():
        assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == digest, name
    assert package["version"]
    assert package["license"]


@pytest.mark.parametrize("package", packages(), ids=lambda package: package["package"])
def test_a_package_has_its_licence(package: dict[str, Any]) -> None:
    assert [name for name in package["files"] if name.endswith("/LICENSE")]


def test_every_file_is_in_the_manifest() -> None:
    there = {str(path.relative_to(VENDOR)) for path in VENDOR.rglob("*") if path.is_file()}
    assert there - OURS == {name for package in packages() for name in package["files"]}
