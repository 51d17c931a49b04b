"""The results of a comparison that is made in slices: one JSON file to which each slice adds.

Promises that a file holds one kind of measurement only, and that a crash while it is written leaves the one before.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from loadtest.compare.measure import Record


class OtherSettings(Exception):
    """The file has figures that can't stand beside the ones that are to be made."""


class Results:
    """All records so far. `add` and `absent` write them to the file at once."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        """Take up `path` when it exists. Raises `OtherSettings` when it was made with others."""
        self._path = path
        self.settings = settings
        self.records: list[Record] = []
        self.absentees: dict[str, str] = {}
        """Peer -> why it was not measured."""
        self.versions: dict[str, list[str]] = {}
        if path.exists():
            stored = json.loads(path.read_text())
            if stored["settings"] != settings:
                raise OtherSettings(
                    f"{path} was made with {stored['settings']}, not {settings}: take those again, or another --out"
                )
            self.records, self.absentees = stored["records"], stored["absent"]
            self.versions = stored["versions"]

    def add(self, record: Record) -> None:
        """A measurement, or why one failed."""
        self.records.append(record)
        self.absentees.pop(record["contender"], None)
        self._save()

    def version(self, contender: str, version: str) -> None:
        """What a contender was measured in."""
        versions = self.versions.setdefault(contender, [])
        if version not in versions:
            versions.append(version)

    def absent(self, contender: str, reason: str) -> None:
        """A peer that can't be installed or started; one that was measured before is not absent."""
        if not any(record["contender"] == contender for record in self.records):
            self.absentees[contender] = reason
        self._save()

    def _save(self) -> None:
        content = {
            "settings": self.settings,
            "versions": self.versions,
            "absent": self.absentees,
            "records": self.records,
        }
        partial = self._path.with_suffix(".partial")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(content, indent=1))
        os.replace(partial, self._path)
