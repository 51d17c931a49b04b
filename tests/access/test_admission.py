"""Who is let in, who is refused, and what either is told: decisions with a clock of the test's own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from fake_replica import generation_request

from serve_app.access.admission import HOPED_SHARE, MOST_SHARE, Admission
from serve_app.access.entry import Entry
from serve_app.access.pace import START_S_PER_TOKEN
from serve_app.core import Failure, FailureCode, Priority, ReplicaLoad, SamplingParams

PLACES = 4
LONGEST = 100
GUESS_S = LONGEST * START_S_PER_TOKEN
"""How long an answer takes as long as nobody knows better."""

MOST_S = 10.0 * MOST_SHARE


@dataclass
class Service:
    """Replicas with places, and a clock."""

    now: float = 0.0
    admission: Admission = field(init=False)
    placed: list[Entry] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.admission = Admission(10.0, clock=lambda: self.now)
        self.admission.capacity.configure(PLACES, shared=False)
        self.admission.update({"a": 256})

    def ask(self, **changes: object) -> Entry | Failure:
        values = {"max_new_tokens": LONGEST, "sampling": SamplingParams(seed=1)} | changes
        answer = self.admission.enter(generation_request(**values))
        self.hand_out()
        return answer

    def ask_many(self, number: int, **changes: object) -> list[Entry | Failure]:
        return [self.ask(**changes) for _ in range(number)]

    def hand_out(self) -> None:
        for _ in self.admission.rounds():
            for lane in self.admission.turns.lanes():
                self.serve(lane)

    def serve(self, lane: Iterator[Entry]) -> None:
        for entry in lane:
            if self.admission.capacity.rooms(entry):
                self.admission.place(entry, "a")
                self.placed.append(entry)
            elif not self.admission.several_tenants:
                break

    def end(self, entry: Entry, new_tokens: int = LONGEST) -> None:
        entry.new_tokens = new_tokens
        self.admission.leave(entry)
        self.admission.give_back(entry, sent=False)
        self.placed.remove(entry)
        self.hand_out()


@pytest.fixture
def service() -> Service:
    return Service()


def codes(answers: list[Entry | Failure]) -> list[FailureCode | None]:
    return [answer.code if isinstance(answer, Failure) else None for answer in answers]


def test_no_more_are_let_in_than_would_start_in_time(service: Service) -> None:
    answers = service.ask_many(40)
    may_wait = int(10.0 * HOPED_SHARE / GUESS_S) * PLACES
    assert codes(answers) == [None] * (PLACES + may_wait) + [FailureCode.OVERLOADED] * (40 - PLACES - may_wait)
    assert service.admission.waiting() == {Priority.INTERACTIVE: may_wait}
    assert service.admission.refused == {"full": 40 - PLACES - may_wait}


def test_each_that_is_refused_is_told_to_come_after_those_before_it(service: Service) -> None:
    refusals = [answer for answer in service.ask_many(40) if isinstance(answer, Failure)]
    told = [refusal.retry_after_s or 0.0 for refusal in refusals]
    per_s = PLACES / GUESS_S
    assert told == sorted(told)
    assert told[-1] == pytest.approx(len(refusals) / per_s, rel=0.01), "as fast as the service works"


def test_a_request_that_is_in_a_hurry_is_refused_sooner(service: Service) -> None:
    service.ask_many(PLACES)
    assert codes([service.ask(remaining_s=GUESS_S), service.ask(remaining_s=GUESS_S / HOPED_SHARE + 1)]) == [
        FailureCode.OVERLOADED,
        None,
    ]


def test_what_is_known_of_the_pace_decides(service: Service) -> None:
    service.ask_many(PLACES)
    service.now += 40.0
    for entry in list(service.placed):
        service.end(entry)
    answers = service.ask_many(2 * PLACES)
    assert codes(answers) == [None] * PLACES + [FailureCode.OVERLOADED] * PLACES, "it would take 40 s"


def test_what_was_let_in_by_a_wrong_estimate_is_refused_when_its_time_is_up(service: Service) -> None:
    waits = service.ask_many(PLACES + 1)[-1]
    assert isinstance(waits, Entry)
    service.now += MOST_S - 0.1
    assert service.admission.late(waits) is None
    assert service.admission.patience_s(waits) == pytest.approx(0.1)
    service.now += 0.2
    refusal = service.admission.late(waits)
    assert refusal is not None
    assert refusal.code is FailureCode.OVERLOADED
    assert service.admission.refused == {"late": 1}


@pytest.mark.parametrize("changes", [{"accepted": True}, {"output_token_ids": (1,)}], ids=str)
def test_what_was_accepted_is_never_refused_and_comes_first(service: Service, changes: dict[str, object]) -> None:
    service.ask_many(40)
    goes_on = service.ask(**changes)
    assert isinstance(goes_on, Entry)
    service.now += 100
    assert service.admission.late(goes_on) is None
    service.end(service.placed[0])
    assert service.placed[-1] is goes_on


def test_nobody_is_refused_as_long_as_there_is_no_replica(service: Service) -> None:
    service.admission.update({})
    waits = service.ask_many(500)[-1]
    assert isinstance(waits, Entry)
    service.now += 100
    assert service.admission.late(waits) is None


def test_a_bulk_is_let_in_as_one_and_none_of_it_is_refused_once_one_has_started(service: Service) -> None:
    of_one_request = SamplingParams(seed=2)
    bulk = [service.ask(sampling=of_one_request, choice=choice) for choice in range(100)]
    assert codes(bulk) == [None] * 100
    assert codes([service.ask()]) == [FailureCode.OVERLOADED], "each choice of it counts"
    service.now += 100
    last = bulk[-1]
    assert isinstance(last, Entry)
    assert service.admission.late(last) is None


def test_a_tenant_over_its_share_is_told_so_and_others_are_let_in(service: Service) -> None:
    greedy = service.ask_many(40, tenant="greedy")
    assert codes(greedy)[-1] is FailureCode.OVERLOADED, "it is alone: the service is full"
    assert codes([service.ask(tenant="other")]) == [None]
    assert codes([service.ask(tenant="greedy")]) == [FailureCode.OVER_SHARE]
    assert codes(service.ask_many(40, tenant="third"))[:2] == [None, None]


@pytest.mark.parametrize(("weight", "at_once"), [(1.0, PLACES // 2), (3.0, 3 * PLACES // 4), (0.2, 0)])
def test_another_tenant_gets_its_share_of_the_places_at_once(service: Service, weight: float, at_once: int) -> None:
    service.ask_many(PLACES + 1, tenant="greedy")
    service.ask_many(PLACES, tenant="modest", weight=weight)
    placed = [entry for entry in service.placed if entry.payer == ("modest", weight)]
    assert len(service.placed) == PLACES + at_once
    assert len(placed) == at_once
    for entry in placed[:1]:
        service.end(entry)
        assert len(service.placed) == PLACES + at_once, "the next one has its place"


def test_batch_gets_no_place_that_others_would_have_to_leave(service: Service) -> None:
    service.ask_many(PLACES + 1, tenant="greedy")
    service.ask(tenant="modest", priority=Priority.BATCH)
    assert len(service.placed) == PLACES


def test_batch_requests_wait_for_all_interactive_ones(service: Service) -> None:
    service.ask_many(PLACES + 3)
    refusal = service.admission.refusal("", 1.0, None, Priority.BATCH)
    assert refusal is None
    service.ask_many(1)
    assert codes([service.ask(priority=Priority.BATCH)]) == [FailureCode.OVERLOADED]


def test_an_ingress_without_places_counts_on_a_share_of_those_of_others(service: Service) -> None:
    service.admission.loaded("a", ReplicaLoad(PLACES, 1, PLACES, 1000, 0, 0.0, 0.0))
    answers = service.ask_many(20)
    assert 2 <= codes(answers).index(FailureCode.OVERLOADED) <= 4


def test_nothing_is_left_of_those_that_have_gone(service: Service) -> None:
    answers = service.ask_many(30, tenant="x")
    service.admission.update({})
    for answer in answers:
        if isinstance(answer, Entry):
            service.admission.leave(answer)
            service.admission.give_back(answer, sent=False)
    admission = service.admission
    assert not admission.turns
    assert admission._entries == admission._groups == admission._placed == {}
    assert admission._shares._tokens == admission._shares._in_place == {}
    assert admission.turns._queues == admission.turns._users == admission.capacity._at == {}
