"""Minutes of overload in a simulated service: how much is done, who waits how long, and what is refused."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

from fake_replica import generation_request

from serve_app.access.admission import Admission
from serve_app.access.entry import Entry
from serve_app.core import Failure, Priority, SamplingParams
from serve_app.fair_queue import may_take_from

PLACES = 32
S_PER_TOKEN = 0.15
"""With all places taken: the demo model on two AVX2 cores."""
PREFILL_S = 1.0
TOKENS = 32, 96
"""Shortest and longest answer; the longest that a request allows is far more."""
MAX_WAIT_S = 10.0
CAPACITY = PLACES / (PREFILL_S + sum(TOKENS) / 2 * S_PER_TOKEN)
"""Requests a second."""


@dataclass
class Tenant:
    """One that asks at random moments."""

    per_s: float
    priority: Priority = Priority.INTERACTIVE
    from_s: float = 0.0
    """When it begins."""
    at_once: int = 0
    """Requests that come together when it begins."""
    asked: int = 0
    waits_s: list[float] = field(default_factory=list)
    """Of those that started, from their arrival to their start."""
    done: int = 0
    tokens: int = 0
    refused: list[Failure] = field(default_factory=list)
    late: int = 0
    """Refused after they had waited."""


class Simulation:
    """An ingress in front of one replica."""

    def __init__(self, seed: int = 1, answers: tuple[int, int] = TOKENS) -> None:
        """`answers`: their least and most tokens."""
        self.now = 0.0
        self._answers = answers
        self.admission = Admission(MAX_WAIT_S, clock=lambda: self.now)
        self.admission.capacity.configure(PLACES, shared=False)
        self.admission.update({"a": 256})
        self.most_running = 0
        self._random = random.Random(seed)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._running: dict[Entry, tuple[float, int]] = {}
        """Entry -> when it ends, and how many tokens it has then."""
        self._made_way: list[tuple[Entry, float, int]] = []
        """Entry, seconds that are left of it, its tokens."""
        self._waiting_in_engine: list[tuple[Entry, Tenant]] = []
        self._tenants: dict[Entry, Tenant] = {}

    def run(self, seconds: float, **tenants: Tenant) -> None:
        for name, tenant in tenants.items():
            for _ in range(tenant.at_once):
                self._at(tenant.from_s, partial(self._ask, name, tenant))
            self._at(
                tenant.from_s + self._random.expovariate(tenant.per_s), partial(self._arrive, name, tenant, seconds)
            )
        while self._events:
            self.now, _, event = heapq.heappop(self._events)
            event()

    def _at(self, when: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), event))

    def _arrive(self, name: str, tenant: Tenant, until: float) -> None:
        if self.now > until:
            return
        self._at(self.now + self._random.expovariate(tenant.per_s), partial(self._arrive, name, tenant, until))
        self._ask(name, tenant)

    def _ask(self, name: str, tenant: Tenant) -> None:
        tenant.asked += 1
        request = generation_request(
            sampling=SamplingParams(seed=1), tenant=name, max_new_tokens=4000, priority=tenant.priority
        )
        entry = self.admission.enter(request)
        if isinstance(entry, Failure):
            tenant.refused.append(entry)
            return
        self._tenants[entry] = tenant
        self._at(self.now + self.admission.patience_s(entry) + 1e-6, partial(self._lose_patience, entry))
        self._hand_out()

    def _lose_patience(self, entry: Entry) -> None:
        if (failure := self.admission.late(entry)) is not None:
            tenant = self._tenants.pop(entry)
            tenant.refused.append(failure)
            tenant.late += 1
            self.admission.leave(entry)

    def _hand_out(self) -> None:
        for _ in self.admission.rounds():
            for lane in self.admission.turns.lanes():
                self._serve(lane)
        self._start()

    def _serve(self, lane: Iterator[Entry]) -> None:
        for entry in lane:
            assert entry.request is not None
            leaves = self.admission.leaves(entry.request.tenant, entry.request.weight)
            if self.admission.capacity.rooms(entry, leaves=leaves):
                self.admission.place(entry, "a")
                self._waiting_in_engine.append((entry, self._tenants[entry]))
            elif not self.admission.several_tenants:
                break

    def _start(self) -> None:
        """As the engine does: who has made way goes on first, and then makes way again."""
        while self._made_way and len(self._running) < PLACES:
            self._run(*self._made_way.pop(0))
        for entry, tenant in list(self._waiting_in_engine):
            if len(self._running) >= PLACES and not self._make_way(entry):
                continue
            self._waiting_in_engine.remove((entry, tenant))
            tenant.waits_s.append(self.now - entry.came_at)
            tokens = self._random.randint(*self._answers)
            self._run(entry, PREFILL_S + tokens * S_PER_TOKEN, tokens)

    def _run(self, entry: Entry, seconds: float, tokens: int) -> None:
        self._running[entry] = ends = self.now + seconds, tokens
        self.most_running = max(self.most_running, len(self._running))
        self._at(ends[0], partial(self._end, entry, ends))

    def _make_way(self, newcomer: Entry) -> bool:
        if newcomer.priority is Priority.BATCH:
            return False
        running = Counter(entry.payer for entry in self._running)
        for entry, (ends, tokens) in reversed(self._running.items()):
            (tenant, weight), (other, others_weight) = newcomer.payer, entry.payer
            if entry.priority is Priority.BATCH or (
                tenant != other and may_take_from(running[newcomer.payer], weight, running[entry.payer], others_weight)
            ):
                del self._running[entry]
                self._made_way.append((entry, ends - self.now, tokens))
                return True
        return False

    def _end(self, entry: Entry, ends: tuple[float, int]) -> None:
        if self._running.get(entry) != ends:
            return  # it has made way meanwhile
        del self._running[entry]
        tenant, tokens = self._tenants[entry], ends[1]
        tenant.done += 1
        tenant.tokens += tokens
        entry.new_tokens = tokens
        self.admission.leave(entry)
        self.admission.give_back(entry, sent=False)
        self._hand_out()


def p99(values: list[float]) -> float:
    return sorted(values)[int(0.99 * len(values))]


def test_ten_times_capacity_is_done_as_well_as_capacity_and_the_rest_is_told_at_once() -> None:
    crowd = Tenant(10 * CAPACITY)
    Simulation().run(180, crowd=crowd)
    possible = PLACES / S_PER_TOKEN * 180
    assert crowd.tokens >= 0.9 * possible
    assert p99(crowd.waits_s) <= MAX_WAIT_S
    assert crowd.late <= 0.02 * len(crowd.refused), "the rest was refused before it waited"
    assert all(refusal.retry_after_s is not None and refusal.retry_after_s >= 1 for refusal in crowd.refused)
    assert crowd.asked == crowd.done + len(crowd.refused)


def test_answers_that_all_end_together_let_no_request_wait_in_the_engine_for_the_next_round() -> None:
    crowd = Tenant(10 * CAPACITY, at_once=400)
    Simulation(answers=(64, 64)).run(180, crowd=crowd)
    late = [wait_s for wait_s in crowd.waits_s if wait_s > MAX_WAIT_S]
    assert len(late) <= 1, "one, before any answer has told how long they take"
    assert crowd.tokens >= 0.9 * PLACES / S_PER_TOKEN * 180


def test_at_half_of_its_capacity_nothing_is_refused() -> None:
    crowd = Tenant(0.5 * CAPACITY)
    Simulation().run(180, crowd=crowd)
    assert crowd.refused == []
    assert p99(crowd.waits_s) < 1.0


def test_one_that_asks_twenty_times_as_much_delays_nobody_else() -> None:
    alone, few, many = Tenant(0.2 * CAPACITY), Tenant(0.2 * CAPACITY), Tenant(4 * CAPACITY, from_s=20.0)
    Simulation().run(180, few=alone)
    Simulation().run(180, few=few, many=many)
    assert few.refused == []
    assert p99(few.waits_s) + PREFILL_S <= 1.5 * (p99(alone.waits_s) + PREFILL_S)
    assert (few.tokens + many.tokens) / 180 >= 0.75 * PLACES / S_PER_TOKEN, "what is left free for few is little"
    assert any(refusal.code == "rate_limit_exceeded" for refusal in many.refused)


def test_tenants_that_all_ask_too_much_get_the_same() -> None:
    tenants = {f"tenant {number}": Tenant(per_s * CAPACITY) for number, per_s in enumerate((1, 2, 8))}
    Simulation().run(60, **tenants)
    done = [tenant.tokens for tenant in tenants.values()]
    assert max(done) <= 1.3 * min(done)


def test_batch_work_takes_what_interactive_requests_leave() -> None:
    interactive, batch = Tenant(0.4 * CAPACITY), Tenant(2 * CAPACITY, Priority.BATCH)
    Simulation().run(180, interactive=interactive, batch=batch)
    assert interactive.refused == []
    assert 0.3 * CAPACITY * 180 <= batch.done <= 0.75 * CAPACITY * 180
