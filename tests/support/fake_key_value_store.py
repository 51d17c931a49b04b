"""Ray's key-value store, as far as notes use it, without Ray."""

from __future__ import annotations

from types import ModuleType

import pytest


class FakeKeyValueStore:
    """Holds notes in a dict; `down` makes every call fail."""

    def __init__(self) -> None:
        self.notes: dict[str, bytes] = {}
        self.down = False

    def put(self, key: str, value: bytes | str, *, overwrite: bool = True) -> None:
        """Ray's own takes text too and gives bytes."""
        self._check()
        if not overwrite and key in self.notes:
            return
        self.notes[key] = value.encode() if isinstance(value, str) else value

    def get(self, key: str) -> bytes | None:
        """None for a key that is not there."""
        self._check()
        return self.notes.get(key)

    def delete(self, key: str) -> None:
        """A key that is not there is no error."""
        self._check()
        self.notes.pop(key, None)

    def used_by(self, module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> FakeKeyValueStore:
        """In place of the functions that `module` has imported."""
        monkeypatch.setattr(module, "put_note", self.put)
        monkeypatch.setattr(module, "get_note", self.get)
        monkeypatch.setattr(module, "delete_note", self.delete)
        return self

    def _check(self) -> None:
        if self.down:
            raise RuntimeError("the GCS is away")
