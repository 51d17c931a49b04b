"""When a stream should leave its replica, as a function of what the router said: no Ray needed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fake_model_server import CARD, request

from serve_app.core import Fingerprint
from serve_app.deployments.dispatch import directory as replica_directory
from serve_app.deployments.dispatch.directory import MOVE_S, MOVING_AT_ONCE, SILENT_FOR_S, Attempt, ReplicaDirectory

OURS, OTHERS = CARD.fingerprint, Fingerprint("other")


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(replica_directory, "time", clock)
    return clock


class Call:
    def cancel(self) -> None:
        """Nothing runs."""


class Changing(dict[str, Fingerprint | None]):
    """What is live, and while somebody looks through it something else is."""

    def __init__(self, table: ReplicaDirectory, *args: Any) -> None:
        super().__init__(*args)
        self._directory = table

    def items(self) -> Any:
        for item in list(super().items()):
            self._directory.update({"c": OURS})
            yield item

    def __iter__(self) -> Iterator[str]:
        for name, _ in self.items():
            yield name


def test_the_router_may_change_what_is_live_at_any_moment() -> None:
    table = ReplicaDirectory()
    table.update(Changing(table, {"b": OURS}))
    assert table.should_leave(at("a"))


def at(replica: str | None, choice: int = 0) -> Attempt:
    attempt = Attempt(request(seed=choice))
    attempt.request = type(attempt.request)(f"r{choice}", OURS, (0,), attempt.request.sampling, 5)
    attempt.replica = replica
    return attempt


@pytest.mark.parametrize(
    ("live", "leaves"),
    [
        ({"a": OURS, "b": OURS}, False),
        ({"b": OURS}, True),
        ({"b": OTHERS}, False),
        ({"b": None}, False),
        ({"b": OTHERS, "c": OURS}, True),
        ({}, False),
    ],
)
def test_it_leaves_a_replica_that_goes_when_another_has_its_weights(
    live: dict[str, Fingerprint | None], leaves: bool
) -> None:
    table = ReplicaDirectory()
    table.update(live)
    assert table.should_leave(at("a")) is leaves


@pytest.mark.parametrize(
    ("numerics_ids", "leaves"),
    [
        ({"a": "x", "b": "x"}, True),
        ({"a": "x", "b": "y"}, False),
        ({"a": "x"}, False),
        ({"a": "", "b": "y"}, True),
        ({"a": "x", "b": "y", "c": "x"}, True),
    ],
)
def test_an_exact_stream_leaves_only_for_one_that_computes_alike(numerics_ids: dict[str, str], leaves: bool) -> None:
    table = ReplicaDirectory()
    attempt = at(None)
    with table.track(attempt.request) as tracked:
        table.update(dict.fromkeys(("a", "b"), OURS), numerics_ids)
        table.sent(attempt.request, "a")
        left = {name: how for name, how in numerics_ids.items() if name != "a"}
        for _ in range(2):  # the router tells the same again
            table.update(dict.fromkeys({"b", *left}, OURS), left)
        assert table.should_leave(tracked) is leaves
    table.update({"b": OURS}, {"b": "y"})
    assert table._numerics_ids == {"b": "y"}, "what is gone and has no streams is forgotten"


def test_one_that_waits_for_a_place_has_nothing_to_leave() -> None:
    table = ReplicaDirectory()
    table.update({"b": OURS})
    assert not table.should_leave(at(None))


def test_few_move_at_once_and_each_that_arrives_makes_room(clock: Clock) -> None:
    table = ReplicaDirectory()
    table.update({"b": OURS})
    movers = [at("a", choice) for choice in range(MOVING_AT_ONCE + 2)]
    assert [table.should_leave(mover) for mover in movers] == [True] * MOVING_AT_ONCE + [False] * 2
    table.heard(at("b", 0), tokens=False)
    assert not table.should_leave(movers[-1])
    table.heard(at("b", 0), tokens=True)
    assert table.should_leave(movers[-1])
    assert not table.should_leave(movers[-2])
    clock.now += MOVE_S + 1  # those that never arrived hold up nobody
    assert table.should_leave(movers[-2])


@pytest.mark.parametrize("known_first", [True, False])
def test_deaths_are_counted_whether_or_not_the_router_looks_for_another_before_it_knows(known_first: bool) -> None:
    """Over gRPC a dead replica is unavailable first, and dead when it is asked again."""
    table = ReplicaDirectory()
    wanted = at(None).request
    with table.track(wanted) as attempt:
        for deaths, replica in enumerate(("a", "b"), start=1):
            table.sent(wanted, replica)
            if known_first:
                table.died(replica)
            table.waiting(wanted)
            table.waiting(wanted)
            table.died(replica)
            assert (attempt.deaths, attempt.replica) == (deaths, None)
        table.sent(wanted, "c")
        table.waiting(wanted)  # it was full
        table.sent(wanted, "d")
        table.died("c")
        assert (attempt.deaths, attempt.replica) == (2, "d")


def test_nobody_moves_to_a_silent_replica_until_it_speaks_or_time_is_over(clock: Clock) -> None:
    table = ReplicaDirectory()
    table.update({"b": OURS})
    table.fell_silent("b", 4)
    assert not table.should_leave(at("a"))
    table.heard(at("b"), tokens=False)
    assert table.should_leave(at("a", 1))
    clock.now += 3
    assert not table.fell_silent("b", 4), "it has spoken meanwhile"
    clock.now += 1
    assert table.fell_silent("b", 4)
    assert table.silent("b")
    clock.now += SILENT_FOR_S + 1
    assert not table.silent("b")


def test_nobody_is_given_to_a_replica_that_is_out_of_order(clock: Clock) -> None:
    table = ReplicaDirectory()
    table.update({"b": OURS})
    table.heard(at("b"), tokens=False)
    table.out_of_order(at("b"))
    assert table.silent("b")
    assert not table.should_leave(at("a"))


def test_what_a_dead_replica_had_not_taken_waits_for_another() -> None:
    table = ReplicaDirectory()
    on_its_way, there, elsewhere = (at(None, choice).request for choice in range(3))
    with table.track(on_its_way) as waits, table.track(there) as lost, table.track(elsewhere) as lives:
        table.sent(on_its_way, "a")
        table.sent(there, "a")
        assert table.taken(there, "a", Call())
        table.sent(elsewhere, "b")
        table.died("a")
        table.died("a")
        assert [attempt.replica for attempt in (waits, lost, lives)] == [None, "a", "b"]
        assert [attempt.deaths for attempt in (waits, lost, lives)] == [1, 0, 0]
        assert table.taken(on_its_way, "a", Call())  # what said so was on its way
        assert (waits.replica, waits.taken) == ("a", True)
        table.sent(on_its_way, "b")
        assert not waits.taken


def test_an_attempt_is_followed_by_its_very_request_until_it_ends() -> None:
    table = ReplicaDirectory()
    wanted, equal = request(), request()
    with table.track(wanted) as attempt:
        table.sent(equal, "x")
        assert attempt.replica is None
        table.sent(wanted, "a")
        assert attempt.replica == "a"
        table.waiting(wanted)
        assert attempt.replica is None
    table.sent(wanted, "b")
    assert attempt.replica is None
