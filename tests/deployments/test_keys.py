"""The guard of an ingress replica: made from its config and environment when it starts."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from api_keys import KEY, entry, write_keys

from serve_app.access.key_file import KeyFileError
from serve_app.access.keys import VARIABLE
from serve_app.api.http.guard import PROBE_SECRET
from serve_app.config import AuthConfig
from serve_app.deployments.ingress import _guard


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what the shell of the tests may have."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv(PROBE_SECRET, raising=False)


def test_it_has_the_keys_of_file_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_keys(path := tmp_path / "keys.yaml", entry("alice", KEY))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(PROBE_SECRET, "probe")
    for named in (str(path), "~/keys.yaml"):
        guard = _guard(AuthConfig(keys_file=named), "0.0.0.0")
        assert guard.keys.find(KEY).caller.name == "alice"
        assert (guard.probe_secret, guard.warning) == ("probe", "")
    monkeypatch.setenv(VARIABLE, KEY)
    assert _guard(AuthConfig(), "0.0.0.0").keys.find(KEY).caller.name == "default"


def test_a_file_that_can_not_be_used_stops_the_start(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    with pytest.raises(KeyFileError, match="there is no file"):
        _guard(AuthConfig(keys_file=str(path)), "127.0.0.1")


@pytest.mark.parametrize(
    ("keys", "host", "said"),
    [
        ("keys: []", "127.0.0.1", "nobody can use this service"),
        ("", "0.0.0.0", "everybody who reaches 0.0.0.0 can use this service"),
        ("", "127.0.0.1", ""),
    ],
)
def test_it_warns_of_a_service_for_nobody_and_of_one_for_everybody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, keys: str, host: str, said: str
) -> None:
    (path := tmp_path / "keys.yaml").write_text(keys)
    with caplog.at_level(logging.WARNING):
        _guard(AuthConfig(keys_file=str(path) if keys else None), host)
    assert said in caplog.text
    assert bool(caplog.records) == bool(said)


def test_a_path_must_be_whole() -> None:
    with pytest.raises(ValueError, match="must be a whole path"):
        AuthConfig(keys_file="keys.yaml")
