"""API keys for tests: a guard that knows them, and the headers of who has one."""

from __future__ import annotations

from pathlib import Path

import yaml

from serve_app.access.keys import ApiKeys, digest_of
from serve_app.api.http.guard import Guard

KEY = "sa-" + "Ef5_-" * 8 + "xyz"
"""The key of alice, of the form of `new_key`. It is the same in all processes: names of tests may hold it."""


def bearer(key: str = KEY) -> dict[str, str]:
    """The headers of who has the key."""
    return {"authorization": f"Bearer {key}"}


def entry(name: str, key: str, **fields: object) -> dict[str, object]:
    """One key of a file."""
    return {"name": name, "sha256": digest_of(key).hex(), **fields}


def write_keys(path: Path, *keys: dict[str, object], **sections: object) -> None:
    """A file with these keys."""
    path.write_text(yaml.safe_dump({"keys": list(keys), **sections}))


def guard_of(path: Path, *keys: dict[str, object], probe_secret: str = "", **sections: object) -> Guard:
    """A guard whose file, at `path`, has these keys; by default alice's."""
    write_keys(path, *(keys or (entry("alice", KEY),)), **sections)
    return Guard(ApiKeys(path), bound_to="0.0.0.0", probe_secret=probe_secret)
