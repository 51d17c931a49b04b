"""The keys of a process: who each one is, and what happens when their file changes, breaks or vanishes."""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime
from pathlib import Path

import pytest
from api_keys import entry, write_keys

from serve_app.access.caller import Limits
from serve_app.access.key_file import KeyFileError
from serve_app.access.keys import VARIABLE, ApiKeys, ExpiredKey, UnknownKey
from serve_app.core import Priority

ALICE, BOB = "sa-" + "aB3_-" * 8 + "xyz", "sa-" + "Cd4-_" * 8 + "xyz"
"""Of the form of `new_key`, and the same in all processes, since names of tests hold them."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_keys(tmp_path / "keys.yaml", entry("alice", ALICE))
    return tmp_path / "keys.yaml"


def knows(keys: ApiKeys, key: str) -> bool:
    try:
        keys.find(key)
    except UnknownKey:
        return False
    return True


def test_a_key_stands_for_its_caller(path: Path) -> None:
    write_keys(
        path,
        entry("alice", ALICE, tenant="research", models=["demo"], priorities=["batch"], limits={"streams": 1}),
        entry("bob", BOB),
        tenants={"research": {"weight": 2.5, "limits": {"requests_per_minute": 9}}},
    )
    keys = ApiKeys(path)
    alice, bob = keys.find(ALICE).caller, keys.find(BOB).caller
    assert (alice.name, alice.tenant, alice.weight) == ("alice", "research", 2.5)
    assert (alice.models, alice.priorities) == (frozenset({"demo"}), frozenset({Priority.BATCH}))
    assert (alice.limits, alice.tenant_limits) == (Limits(streams=1), Limits(requests_per_minute=9))
    assert (bob.tenant, bob.models, bob.priorities, bob.admin) == ("bob", None, frozenset(Priority), False)


@pytest.mark.parametrize("wrong", ["", "x", ALICE[:-1], ALICE + "x", ALICE.upper(), "ü", "\udcff", "x" * 10_000])
def test_any_other_key_is_unknown(path: Path, wrong: str) -> None:
    assert not knows(ApiKeys(path), wrong)


def test_a_key_expires(path: Path) -> None:
    now = 1_900_000_000.0
    write_keys(path, entry("alice", ALICE, expires=datetime.fromtimestamp(now, UTC)))
    keys = ApiKeys(path, now=lambda: now)
    with pytest.raises(ExpiredKey):
        keys.find(ALICE)
    now -= 1
    assert keys.find(ALICE).caller.name == "alice"


def test_a_change_counts_without_a_restart(path: Path) -> None:
    keys = ApiKeys(path)
    write_keys(path, entry("bob", BOB))
    keys.refresh()
    assert knows(keys, BOB)
    assert not knows(keys, ALICE)


def test_what_breaks_or_vanishes_later_changes_nothing(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = ApiKeys(path)
    for spoil in (lambda: path.write_text("keys: ["), path.unlink):
        spoil()
        with caplog.at_level(logging.ERROR):
            keys.refresh()
            keys.refresh()
        assert len(caplog.records) == 1  # once for each change
        assert keys.fault in caplog.text
        caplog.clear()
        assert knows(keys, ALICE)
    write_keys(path, entry("bob", BOB))
    keys.refresh()
    assert not keys.fault
    assert (knows(keys, ALICE), knows(keys, BOB)) == (False, True)


async def test_the_file_is_watched(path: Path) -> None:
    keys = ApiKeys(path)
    watching = asyncio.create_task(keys.watch(0.001))
    write_keys(path, entry("bob", BOB))
    async with asyncio.timeout(10):
        while not knows(keys, BOB):  # noqa: ASYNC110 - the change comes from a thread
            await asyncio.sleep(0.001)
    watching.cancel()
    await ApiKeys().watch()  # without a file there is nothing to watch


def test_a_broken_file_is_an_error_at_the_start(path: Path) -> None:
    path.write_text("keys: [")
    with pytest.raises(KeyFileError, match="not YAML"):
        ApiKeys(path)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (ALICE, "default"),
        (f" {BOB}, {ALICE},", "default"),
        (f"alice={ALICE}", "alice"),
        (f"bob={BOB} alice={ALICE}", "alice"),
    ],
)
def test_keys_of_the_environment(text: str, name: str) -> None:
    keys = ApiKeys(environment={VARIABLE: text})
    assert keys.required
    caller = keys.find(ALICE).caller
    assert (caller.name, caller.tenant) == (name, name)


def test_a_key_may_end_as_base64_does() -> None:
    key = "YWJjZGVmZ2hpamtsbW5vcHE=="
    assert ApiKeys(environment={VARIABLE: key}).find(key).caller.name == "default"


@pytest.mark.parametrize("text", ["short", "alice=short", "bob=" + "ä" * 20])
def test_a_bad_key_of_the_environment_is_an_error_that_does_not_repeat_it(text: str) -> None:
    with pytest.raises(KeyFileError, match=f"key 2 in {VARIABLE}") as caught:
        ApiKeys(environment={VARIABLE: f"{ALICE} {text}"})
    assert text.rpartition("=")[2] not in str(caught.value)


def test_file_and_environment_together(path: Path) -> None:
    keys = ApiKeys(path, {VARIABLE: BOB})
    assert len(keys) == 2
    write_keys(path)
    keys.refresh()
    assert (knows(keys, ALICE), knows(keys, BOB)) == (False, True)


def test_without_keys_none_is_asked_for() -> None:
    assert not ApiKeys(environment={}).required
