"""When a service counts as being at rest: also what is not told is noticed."""

from __future__ import annotations

from typing import Any

import httpx
import psutil
import pytest

from loadtest import idle
from loadtest.faults import INGRESS, MODEL
from loadtest.idle import Counts, count, differences
from loadtest.service import Replica

REST = {
    **{(name, "model"): 0.0 for name in idle.ZERO[MODEL]},
    **{(name, "front"): 0.0 for name in (*idle.ZERO[INGRESS], *idle.KEPT)},
    (idle.TASKS, "model"): 5.0,
    (idle.TASKS, "front"): 7.0,
}
"""Gauges of one replica each, as they are at rest."""


class Service:
    """To stand in for a `ChaosService`: this process is all its processes."""

    def __init__(self, values: dict[tuple[str, str], float], ingresses: tuple[str, ...] = ("front",)) -> None:
        self.values = values
        self._workers = {MODEL: ("model",), INGRESS: ingresses}

    def metrics(self, names: set[str]) -> dict[tuple[str, str], float]:
        return {key: value for key, value in self.values.items() if key[0] in names}

    def replicas(self, deployment: str) -> list[Replica]:
        return [Replica(worker, psutil.Process()) for worker in self._workers[deployment]]

    def proxies(self) -> list[psutil.Process]:
        return [psutil.Process()]

    def settled(self) -> bool:
        return True

    def ask_for_nothing(self) -> None:
        """Nothing needs to be counted here."""


def counts(values: dict[tuple[str, str], float], *ingresses: str) -> Counts:
    service: Any = Service(values, ingresses or ("front",))
    return count(service)


def test_a_service_at_rest() -> None:
    now = counts(REST)
    assert differences(now, None) == []
    assert differences(now, now) == []
    assert now.largest[INGRESS]["tasks"] == 7
    assert set(now.largest) == {MODEL, INGRESS, "proxy"}


@pytest.mark.parametrize("key", REST, ids="-".join)
def test_a_gauge_that_is_lost_is_not_zero(key: tuple[str, str]) -> None:
    now = counts({known: value for known, value in REST.items() if known != key})
    (wrong,) = differences(now, counts(REST))
    assert key[0] in wrong
    assert "is missing" in wrong


@pytest.mark.parametrize("key", [key for key in REST if key[0] != idle.TASKS], ids="-".join)
def test_what_is_not_zero_is_no_rest(key: tuple[str, str]) -> None:
    assert differences(counts(REST | {key: 2.0}), counts(REST)) == [f"{key[0]} is 2"]


def test_each_replica_must_tell_and_one_ingress_counts_the_journals() -> None:
    (in_progress,) = idle.ZERO[INGRESS]
    second = {(idle.TASKS, "other"): 3.0}
    (wrong,) = differences(counts(REST | second, "front", "other"), None)
    assert wrong.startswith(in_progress)
    told = second | {(in_progress, "other"): 0.0}
    assert differences(counts(REST | told, "front", "other"), None) == []


def test_what_has_grown_since_is_named() -> None:
    before, now = counts(REST), counts(REST | {(idle.TASKS, "front"): 7.0 + idle.SLACK["tasks"] + 1})
    assert differences(now, before) == [f"{INGRESS} has 16 tasks, 7 before"]


async def test_what_expires_by_itself_was_there_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen at the first look, and gone when a replica that is still busy then has come to rest."""
    monkeypatch.setattr(idle, "_TOLD_S", 0.0)
    (in_progress,) = idle.ZERO[INGRESS]
    journals, *_ = idle.KEPT
    looks = iter([{(journals, "front"): 3.0, (in_progress, "front"): 1.0}, {}])

    class Expiring(Service):
        def ask_for_nothing(self) -> None:
            self.values = REST | next(looks)

    service: Any = Expiring(REST)
    before, wrong = await idle.until_idle(service, None)
    assert wrong == []
    assert before.kept == dict.fromkeys(idle.KEPT, 0.0) | {journals: 3.0}
    looks = iter([{(journals, "front"): 3.0}, {}])
    after, wrong = await idle.until_idle(service, before)
    assert wrong == []
    assert set(after.kept.values()) == {0.0}


async def test_a_service_that_never_tells_is_not_at_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle, "PATIENCE_S", 0.0)
    monkeypatch.setattr(idle, "_TOLD_S", 0.0)

    class Mute(Service):
        def metrics(self, names: set[str]) -> dict[tuple[str, str], float]:
            raise httpx.ReadTimeout("nothing came")

    service: Any = Mute(REST)
    _, wrong = await idle.until_idle(service, None)
    assert wrong == ["the counts can't be read: nothing came"]
    lost: Any = Service({})
    _, wrong = await idle.until_idle(lost, None)
    assert len(wrong) == len(REST)
