"""The file of API keys: what is read, what is refused with which words, and how it is written."""

from __future__ import annotations

import os
import stat
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest
import yaml

from serve_app.access import key_file
from serve_app.access.caller import Limits
from serve_app.access.key_file import (
    KeyFile,
    KeyFileError,
    LimitsDocument,
    PriorityName,
    changing,
    parse_key_file,
    read_key_file,
)
from serve_app.core import Priority

SHA = "ab" * 32
WHOLE = f"""\
tenants:
  research: {{weight: 2, limits: {{tokens_per_day: 1000}}}}
keys:
- name: alice
  sha256: {SHA}
  tenant: research
  admin: true
  models: [demo]
  priorities: [batch]
  limits: {{streams: 2}}
  expires: 2027-01-31T00:00:00Z
"""


def parse(text: str) -> KeyFile:
    return parse_key_file(text.encode(), Path("keys.yaml"))


def test_a_whole_file() -> None:
    (key,) = parse(WHOLE).keys
    assert (key.tenant, key.admin, key.models, key.limits.streams) == ("research", True, ["demo"], 2)
    assert key.expires is not None
    assert key.expires.isoformat() == "2027-01-31T00:00:00+00:00"
    assert parse("").keys == []


def test_the_fields_are_those_of_a_caller() -> None:
    assert set(LimitsDocument.model_fields) == {field.name for field in fields(Limits)}
    assert set(get_args(PriorityName)) == set(Priority)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("keys: 3", "keys.yaml:1: keys: Input should be a valid list"),
        ("- 1", "keys.yaml:1: Input should be a valid dictionary or instance of KeyFile"),
        ("keys: [", ": not YAML"),
        ("keys: []\nkeys: []", "keys.yaml:2: `keys` is given twice"),
        ("key: []", "keys.yaml:1: key: there is no such field"),
        (f"keys:\n- {{name: a, sha256: {SHA}, model: [x]}}", "keys.yaml:2: keys[0].model: there is no such field"),
        ("keys:\n- {name: a, sha256: sa-secret}", "keys[0].sha256: must be the SHA-256 of a key, 64 hexadecimal"),
        (f"keys:\n- {{sha256: {SHA}}}", "keys[0].name: Field required"),
        (f"keys:\n- {{name: 'a b', sha256: {SHA}}}", "keys[0].name: must be a name of letters, digits"),
        (f"keys:\n- {{name: 12, sha256: {SHA}}}", "keys[0].name: Input should be a valid string"),
        (f"keys:\n- {{name: a, sha256: {SHA}, expires: 2027-01-31}}", "expires: must be a time with its zone"),
        (f"keys:\n- {{name: a, sha256: {SHA}, expires: 2027-01-31T00:00:00}}", "must be a time with its zone"),
        (f"keys:\n- {{name: a, sha256: {SHA}, models: []}}", "keys[0].models: List should have at least 1 item"),
        (f"keys:\n- {{name: a, sha256: {SHA}, priorities: [high]}}", "Input should be 'interactive' or 'batch'"),
        (f"keys:\n- {{name: a, sha256: {SHA}, limits: {{streams: 0}}}}", "limits.streams: Input should be greater"),
        (f"keys:\n- {{name: a, sha256: {SHA}, limits: {{streams: yes}}}}", "streams: Input should be a valid integer"),
        ("tenants: {a: {weight: .inf}}", "tenants.a.weight: Input should be a finite number"),
        ("tenants: {a b: {}}", "must be a name of letters, digits"),
        (f"keys:\n- {{name: a, sha256: {SHA}}}\n- {{name: a, sha256: {'0a' * 32}}}", ":3: keys[1] has the name of"),
        (f"keys:\n- {{name: a, sha256: {SHA}}}\n- {{name: b, sha256: {SHA}}}", "keys[1] has the sha256 of keys[0]"),
    ],
)
def test_mistakes_are_named_with_their_line(text: str, message: str) -> None:
    with pytest.raises(KeyFileError) as caught:
        parse(text)
    assert message in str(caught.value)
    assert "sa-secret" not in str(caught.value)


def test_files_that_can_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    with pytest.raises(KeyFileError, match=r"there is no file .*serve-app keys create"):
        read_key_file(path)
    with pytest.raises(KeyFileError, match="can't be read"):
        read_key_file(tmp_path)
    path.write_bytes(b"\xff")
    with pytest.raises(KeyFileError, match="UTF-8"):
        read_key_file(path)
    path.chmod(0o666)
    with pytest.raises(KeyFileError, match="chmod o-w"):
        read_key_file(path)


def test_a_pipe_does_not_hold_up_the_start(tmp_path: Path) -> None:
    os.mkfifo(path := tmp_path / "keys.yaml")
    with pytest.raises(KeyFileError, match="no regular file"):
        read_key_file(path)


def test_a_change_is_written_in_one_step_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "keys.yaml"
    with changing(path) as (file, changed):
        assert file == KeyFile()
        changed.append(parse(WHOLE))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_key_file(path) == parse(WHOLE)
    assert "\n# service reads it again" in path.read_text()
    before = path.stat().st_ino
    with changing(path) as (file, changed):
        changed.append(file.model_copy(update={"keys": []}))
    assert path.stat().st_ino != before
    assert yaml.safe_load(path.read_text())["keys"] == []
    assert {each.name for each in path.parent.iterdir()} <= {"keys.yaml", "keys.yaml.lock"}


def test_nothing_is_written_after_an_error(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(WHOLE)
    with pytest.raises(RuntimeError), changing(path):
        raise RuntimeError
    assert path.read_text() == WHOLE


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link, real = tmp_path / "keys.yaml", tmp_path / "real" / "keys.yaml"
    link.symlink_to(real)
    with changing(link) as (_, changed):
        changed.append(parse(WHOLE))
    assert link.is_symlink()
    assert read_key_file(real) == parse(WHOLE)


def test_two_commands_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_file, "LOCK_PATIENCE_S", 0)
    path = tmp_path / "keys.yaml"
    with changing(path), pytest.raises(KeyFileError, match="another command"), changing(path):
        pass
    with changing(path):
        pass
