"""`serve-app keys`: what it writes, what it prints and where, and what it refuses."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml

from serve_app.access.key_file import read_key_file
from serve_app.access.keys import ApiKeys
from serve_app.cli.main import main

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


def create(path: Path, name: str, *options: str) -> int:
    return main(["keys", "create", name, "--file", str(path), *options])


def test_a_key_is_printed_once_and_works(path: Path, capsys: Capture) -> None:
    assert create(path, "alice", "--tenant", "research", "--model", "a", "--model", "b", "--streams", "3") == 0
    printed = capsys.readouterr()
    key = printed.out.strip()
    assert "can't be shown again" in printed.err
    assert key not in printed.err + path.read_text()
    caller = ApiKeys(path).find(key).caller
    assert (caller.name, caller.tenant, caller.models) == ("alice", "research", {"a", "b"})
    assert caller.limits.streams == 3
    assert main(["keys", "list", "--file", str(path)]) == 0
    listed = capsys.readouterr().out
    assert "models: a, b; streams: 3" in listed
    assert key not in listed


def test_a_revoked_key_is_gone(path: Path, capsys: Capture) -> None:
    create(path, "alice")
    create(path, "bob")
    assert main(["keys", "revoke", "alice", "--file", str(path)]) == 0
    assert [key.name for key in read_key_file(path).keys] == ["bob"]
    assert "is revoked" in capsys.readouterr().err


def test_tenants_of_the_file_stay(path: Path) -> None:
    path.write_text("tenants: {research: {weight: 2}}")
    path.chmod(0o644)
    create(path, "alice", "--tenant", "research")
    assert read_key_file(path).tenants["research"].weight == 2
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("when", ["90d", "12h", "30m", "2100-01-31T00:00Z", "2100-01-31T00:00:00+02:00"])
def test_a_key_can_expire(path: Path, when: str, capsys: Capture) -> None:
    assert create(path, "alice", "--expires", when) == 0
    (key,) = read_key_file(path).keys
    assert key.expires is not None
    assert key.expires > datetime.now(UTC) + timedelta(minutes=20)
    main(["keys", "list", "--file", str(path)])
    assert f"{key.expires.astimezone(UTC):%Y-%m-%d}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["create", "a b"], "name 'a b' must be letters"),
        (["create", "a", "--tenant", "x/y"], "tenant 'x/y' must be letters"),
        (["create", "a", "--streams", "0"], "--streams: Input should be greater than or equal to 1"),
        (["create", "a", "--expires", "soon"], "--expires 'soon' is no time; write"),
        (["create", "a", "--expires", "2027-01-31"], "is no time; write"),
        (["create", "alice"], "has a key alice already; revoke it first"),
        (["revoke", "bob"], "has no key bob (its keys: alice)"),
    ],
)
def test_mistakes_are_said_and_change_nothing(path: Path, arguments: list[str], said: str, capsys: Capture) -> None:
    create(path, "alice")
    before = path.read_text()
    assert main(["keys", *arguments, "--file", str(path)]) != 0
    assert said in capsys.readouterr().err
    assert path.read_text() == before


def test_a_broken_file_is_not_overwritten(path: Path, capsys: Capture) -> None:
    path.write_text("keys: 3")
    for arguments in (["create", "a"], ["revoke", "a"], ["list"]):
        assert main(["keys", *arguments, "--file", str(path)]) == 1
        assert f"{path}:1: keys: Input should be a valid list" in capsys.readouterr().err
    assert path.read_text() == "keys: 3"


def test_the_config_can_name_the_file(path: Path, tmp_path: Path, capsys: Capture) -> None:
    config = tmp_path / "serve.yaml"
    application = {"name": "a", "import_path": "serve_app.app:build", "args": {"auth": {"keys_file": str(path)}}}
    config.write_text(yaml.safe_dump({"applications": [application]}))
    assert main(["keys", "create", "alice", "--config", str(config)]) == 0
    assert path.exists()
    del application["args"]
    config.write_text(yaml.safe_dump({"applications": [application]}))
    assert main(["keys", "list", "--config", str(config)]) == 2
    assert "names no file of keys in auth.keys_file; give it with --file" in capsys.readouterr().err
