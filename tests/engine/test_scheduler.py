"""What the next step holds: a plain function of the queue, the budget and the pages."""

from __future__ import annotations

import pytest
import torch
from exploring import cases
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from serve_app.core import Fingerprint, GenerationRequest, Priority, SamplingParams
from serve_app.engine import scheduler as scheduling
from serve_app.engine import waiting_line
from serve_app.engine.kv_cache import PagePool
from serve_app.engine.prompt_pace import PromptPace
from serve_app.engine.scheduler import Chunk, Scheduler
from serve_app.engine.sequence import Sequence

PAGE = 4


def sequence(
    arrival: int,
    prompt: int,
    new: int = 8,
    salt: str = "",
    first_id: int = 0,
    delivered: int = 0,
    isolated: bool = False,
    tenant: str = "",
    weight: float = 1.0,
    batch: bool = False,
) -> Sequence:
    """`delivered`: how many of the `new` tokens an earlier attempt, on another replica, has brought."""
    request = GenerationRequest(
        str(arrival),
        Fingerprint("x"),
        tuple(range(first_id, first_id + prompt)),
        SamplingParams(seed=0),
        new,
        output_token_ids=(100_000,) * delivered,
        cache_salt=salt,
        isolated=isolated,
        tenant=tenant,
        weight=weight,
        priority=Priority.BATCH if batch else Priority.INTERACTIVE,
    )
    return Sequence(request, arrival)


class Pace(PromptPace):
    """So many tokens of prompts beside any number of decodes."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens

    def most(self, decodes: int) -> int:
        return self.tokens


def scheduler(
    pages: int = 64,
    running: int = 4,
    budget: int = 16,
    lookup: bool = False,
    in_runs: bool = True,
    pace: int | None = None,
) -> Scheduler:
    return Scheduler(
        PagePool(pages, in_runs=in_runs),
        page_tokens=PAGE,
        max_running=running,
        max_step_tokens=budget,
        prompt_lookup=lookup,
        pace=None if pace is None else Pace(pace),
    )


def step(scheduler: Scheduler) -> list[tuple[int, int]]:
    """Schedule and pretend to compute: (arrival, tokens) of each chunk. Complete sequences get one token more."""
    chunks = scheduler.schedule()
    assert len(chunks) == 1 or not any(chunk.sequence.isolated for chunk in chunks), (
        "an isolated sequence shares its step"
    )
    for chunk in chunks:
        completes = chunk.completes
        scheduler.mark_computed(chunk.sequence, chunk.tokens)
        if completes and chunk.sequence.append(100_000) is not None:
            scheduler.remove(chunk.sequence)
    return [(chunk.sequence.arrival, chunk.tokens) for chunk in chunks]


def test_decodes_come_first_and_prefills_share_what_the_budget_leaves() -> None:
    s = scheduler(budget=10)
    s.add(sequence(1, 3))
    assert step(s) == [(1, 3)]
    s.add(sequence(2, 20, first_id=500))
    s.add(sequence(3, 5, first_id=900))
    assert step(s) == [(1, 1), (2, 9)]
    assert step(s) == [(1, 1), (2, 9)]
    assert step(s) == [(1, 1), (2, 2), (3, 5)]


def test_no_more_run_than_may_and_those_that_somebody_reads_go_first() -> None:
    s = scheduler(running=2)
    for arrival, delivered in ((1, 0), (2, 0), (3, 4)):
        s.add(sequence(arrival, 2, delivered=delivered, first_id=arrival * 100))
    assert [arrival for arrival, _ in step(s)] == [3, 1]
    assert [waiting.arrival for waiting in s.waiting] == [2]


def test_the_youngest_is_preempted_when_pages_run_out_and_finishes_later() -> None:
    s = scheduler(pages=5, running=4, budget=32)
    old, young = sequence(1, 8, new=12), sequence(2, 4, new=12, first_id=500)
    s.add(old)
    s.add(young)
    for _ in range(100):
        step(s)
    assert s.preemptions > 0
    assert young.preemptions > 0
    assert old.preemptions == 0
    assert (old.output_len, young.output_len) == (12, 12)
    assert s.pool.used == 0


def test_a_stream_that_somebody_reads_goes_on_before_new_ones_begin() -> None:
    s = scheduler(running=2)
    for arrival in (1, 2, 3):
        s.add(sequence(arrival, 2, first_id=arrival * 100))
    s.add(sequence(4, 2, delivered=3, first_id=400))
    assert [arrival for arrival, _ in step(s)] == [4, 1]
    assert [waiting.arrival for waiting in s.waiting] == [2, 3]


def test_what_has_not_begun_makes_way_for_a_stream_that_somebody_reads_and_keeps_its_prefix() -> None:
    s = scheduler(running=2, budget=8)
    reading, beginning = sequence(1, 2, new=20), sequence(2, 30, first_id=200)
    s.add(reading)
    step(s)
    s.add(beginning)
    assert [step(s), step(s)] == [[(1, 1), (2, 7)], [(1, 1), (2, 7)]]
    s.add(sequence(3, 3, new=4, delivered=2, first_id=300))
    assert step(s) == [(1, 1), (3, 5)]
    assert beginning.preemptions == 1
    assert step(s) == [(1, 1), (3, 1)]
    assert step(s) == [(1, 1), (2, 7)]
    assert beginning.computed == 12 + 7, "three full pages were kept"


def test_nobody_makes_way_who_has_begun() -> None:
    s = scheduler(running=1)
    s.add(sequence(1, 2))
    step(s)
    s.add(sequence(2, 2, delivered=5, first_id=200))
    assert step(s) == [(1, 1)]


def test_pages_come_first_from_what_has_not_begun() -> None:
    s = scheduler(pages=8, running=3, budget=10)
    s.add(sequence(1, 4, new=8))
    step(s)
    beginning = sequence(2, 18, first_id=200)
    s.add(beginning)
    step(s)
    s.add(sequence(3, 3, new=8, delivered=6, first_id=300))
    assert [arrival for arrival, _ in step(s)] == [1, 3]
    assert beginning.preemptions == 1


def test_a_suspect_has_its_steps_to_itself_until_its_first_token() -> None:
    s = scheduler(budget=8)
    s.add(sequence(1, 3))
    step(s)
    s.add(sequence(2, 10, first_id=500, isolated=True))
    s.add(sequence(3, 2, first_id=900))
    assert [step(s) for _ in range(4)] == [[(1, 1)], [(2, 8)], [(2, 2)], [(1, 1), (2, 1), (3, 2)]]


def test_a_suspect_that_comes_first_starts_at_once_and_alone() -> None:
    s = scheduler()
    s.add(sequence(1, 3, isolated=True))
    s.add(sequence(2, 3, first_id=500))
    assert step(s) == [(1, 3)]
    assert step(s) == [(1, 1), (2, 3)]


def test_a_prompt_under_way_does_not_join_a_suspect() -> None:
    s = scheduler(budget=16)
    s.add(sequence(1, 40))
    step(s)
    s.add(sequence(2, 10, delivered=2, first_id=500, isolated=True))
    assert [step(s) for _ in range(2)] == [[(2, 12)], [(2, 1), (1, 15)]]


def test_nor_does_it_fill_the_step_in_which_a_suspect_is_admitted() -> None:
    s = scheduler(budget=16)
    s.add(sequence(1, 3))
    step(s)
    s.add(sequence(2, 40, first_id=200))
    step(s)
    s.add(sequence(3, 10, delivered=2, first_id=500, isolated=True))
    assert [step(s) for _ in range(3)] == [[(1, 1)], [(3, 12)], [(1, 1), (3, 1), (2, 14)]]


def drain(s: Scheduler, steps: int = 2_000) -> list[int]:
    """Step until nothing is left: the arrivals, in the order in which their outputs began."""
    begun: dict[int, None] = {}
    for _ in range(steps):
        if not (s.running or s.waiting):
            return list(begun)
        waits = [one for one in s.running + s.waiting if one.output_len == 0]
        step(s)
        begun |= dict.fromkeys(one.arrival for one in sorted(waits, key=lambda one: one.turn) if one.output_len)
    raise AssertionError("not all of them finish")


def test_a_tenant_with_many_requests_makes_way_for_another_up_to_its_share() -> None:
    s = scheduler(running=2)
    for arrival in range(1, 9):
        s.add(sequence(arrival, 3, first_id=arrival * 100, tenant="greedy"))
    step(s)
    s.add(sequence(9, 3, first_id=900, tenant="modest"))
    s.add(sequence(10, 3, first_id=1000, tenant="modest"))
    assert drain(s) == [9, 10, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(("weight", "at_once"), [(1.0, 2), (3.0, 3), (0.3, 0)])
def test_who_yields_goes_on_before_the_other_tenant_gets_more_than_its_share(weight: float, at_once: int) -> None:
    s = scheduler(running=4, budget=64)
    greedy = [sequence(arrival, 3, new=60, first_id=arrival * 100, tenant="greedy") for arrival in range(5)]
    for one in greedy:
        s.add(one)
    for _ in range(3):
        step(s)
    for arrival in range(10, 15):
        s.add(sequence(arrival, 3, new=20, first_id=arrival * 100, tenant="modest", weight=weight))
    step(s)
    assert [one.arrival for one in s.running if one.request.tenant == "modest"] == [*range(10, 10 + at_once)]
    assert sum(one.yielded for one in greedy) == at_once
    order = drain(s, steps=1000)
    assert [one.output_len for one in greedy] == [60] * 5
    assert [one for one in order if one >= 10] == [*range(10 + at_once, 15)], "what ran already has begun"
    assert s.preemptions <= 5, "nobody takes a place from each other in turns"


def several(running: int, pace: int | None, greedy: int = 8) -> Scheduler:
    """With a tenant that has all places, and another one that has asked before."""
    s = scheduler(running=running, budget=64, pages=256, pace=pace)
    s.add(sequence(100, 3, new=1, first_id=9000, tenant="modest"))
    drain(s)
    for arrival in range(greedy):
        s.add(sequence(arrival, 12, new=60, first_id=arrival * 100, tenant="greedy"))
    return s


def test_prompts_of_a_step_are_few_where_several_tenants_ask() -> None:
    s = several(running=8, pace=10)
    assert step(s) == [(0, 10)]
    assert step(s) == [(0, 2), (1, 8)]
    assert step(s) == [(0, 1), (1, 4), (2, 6)]
    alone = several(running=8, pace=10, greedy=1)
    assert step(alone) == [(0, 12)], "nobody else is there"


def test_one_tenant_alone_may_fill_a_step_with_prompts() -> None:
    s = scheduler(running=8, budget=64, pages=256, pace=10)
    for arrival in range(8):
        s.add(sequence(arrival, 12, first_id=arrival * 100, tenant="only"))
    assert step(s) == [*((arrival, 12) for arrival in range(5)), (5, 4)]


def test_another_tenant_that_has_not_asked_for_long_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting_line, "SEVERAL_WITHIN", 6)
    s = several(running=8, pace=10)
    assert not s.line.several_tenants
    assert sum(tokens for _, tokens in step(s)) == 64


def test_a_tenant_with_more_than_its_share_pauses_until_another_has_its_first_token() -> None:
    s = several(running=4, pace=10)
    for _ in range(8):
        step(s)
    s.add(sequence(20, 20, new=3, first_id=5000, tenant="modest"))
    s.add(sequence(21, 8, new=3, first_id=6000, tenant="modest"))
    assert step(s) == [(20, 20), (21, 8)], "the prompts of two, and no token of the others"
    assert [arrival for arrival, _ in step(s)] == [0, 1, 20, 21]


def test_a_tenant_that_keeps_sending_prompts_does_not_keep_the_others_from_every_step() -> None:
    s = several(running=6, pace=10, greedy=4)
    for _ in range(8):
        step(s)
    paused = 0
    for number in range(40):
        s.add(sequence(200 + number, 3, new=1, first_id=5000 + 100 * number, tenant="modest"))
        paused += all(arrival >= 200 for arrival, _ in step(s))
    assert paused == 20 + scheduling.PAUSES // 2


def test_who_pauses_goes_on_if_the_other_does_not_fit() -> None:
    s = several(running=4, pace=10)
    for _ in range(8):
        step(s)
    running = list(s.running)
    for one in running:
        one.yields_from = 1000
    s.add(sequence(20, 20, new=3, first_id=5000, tenant="modest"))
    assert [arrival for arrival, _ in step(s)] == [one.arrival for one in running]


def test_a_stream_that_a_failover_brought_does_not_wait_for_one_that_has_yielded() -> None:
    s = scheduler(running=4, budget=64)
    for arrival in range(4):
        s.add(sequence(arrival, 3, new=60, first_id=arrival * 100, tenant="greedy"))
    step(s)
    s.add(sequence(5, 3, new=20, first_id=500, tenant="modest"))
    step(s)
    s.add(sequence(6, 3, new=20, delivered=5, first_id=600, tenant="modest"))
    assert any(one.yielded for one in s.waiting)
    assert (6, 8) in step(s)


def test_a_tenant_yields_pages_too_but_not_in_vain() -> None:
    s = scheduler(pages=12, running=8, budget=64)
    for arrival in (1, 2, 3):
        s.add(sequence(arrival, 7, new=8, first_id=arrival * 100, tenant="greedy"))
    step(s)
    large = sequence(4, 40, new=1, first_id=400, tenant="modest")
    s.add(large)
    step(s)
    assert s.preemptions == 0, "three would have to yield, and two is what the tenant may take"
    s.remove(large)
    s.add(sequence(5, 7, new=1, first_id=500, tenant="modest"))
    assert (5, 7) in step(s)
    assert s.preemptions == 1


def test_a_tenants_weight_is_its_share_of_the_starts() -> None:
    s = scheduler(running=1)
    for arrival in range(8):
        s.add(sequence(arrival, 3, first_id=arrival * 100, tenant="one"))
        s.add(sequence(arrival + 8, 3, first_id=arrival * 100, tenant="three", weight=3.0))
    assert sum(arrival >= 8 for arrival in drain(s)[:8]) == 6


def test_who_started_later_is_the_younger_one_whenever_it_came() -> None:
    s = scheduler(pages=9, running=4, budget=32)
    for arrival in (1, 2):
        s.add(sequence(arrival, 6, new=20, first_id=arrival * 100, tenant="greedy"))
    modest = sequence(3, 6, new=20, first_id=300, tenant="modest")
    s.add(modest)
    step(s)
    assert [one.arrival for one in s.running] == [1, 3, 2]
    while not s.preemptions:
        step(s)
    assert [one.arrival for one in s.waiting] == [2]


def test_what_was_preempted_comes_back_before_new_work_of_any_tenant() -> None:
    s = scheduler(pages=5, running=4, budget=32)
    s.add(sequence(1, 8, new=12, tenant="a"))
    s.add(sequence(2, 4, new=12, first_id=500, tenant="a"))
    while not s.preemptions:
        step(s)
    s.add(sequence(3, 2, new=2, first_id=900, tenant="b"))
    assert [one.arrival for one in s.waiting] == [2, 3]
    while s.waiting:
        step(s)
        assert [one.arrival for one in s.waiting] in ([2, 3], [3], [])


def test_many_requests_in_few_pages_all_finish_in_their_order() -> None:
    s = scheduler(pages=8, running=6, budget=16)
    for arrival in range(60):
        s.add(sequence(arrival, 1 + arrival * 7 % 13, new=1 + arrival * 5 % 17, first_id=arrival * 100))
    assert drain(s) == list(range(60))
    assert s.preemptions > 0
    assert s.pool.used == 0


def test_batch_starts_when_no_interactive_request_waits_even_if_that_does_not_fit() -> None:
    s = scheduler(pages=8, running=3, budget=64)
    s.add(sequence(1, 12, new=8))
    step(s)
    s.add(sequence(2, 2, first_id=200, batch=True))
    s.add(sequence(3, 20, new=4, first_id=300))
    while any(one.arrival == 1 for one in s.running):
        assert [one.arrival for one in s.running] == [1]
        step(s)
    assert drain(s) == [3, 2]


def test_batch_gives_its_place_to_an_interactive_request_and_goes_on_afterwards() -> None:
    s = scheduler(running=2)
    first, second = (sequence(arrival, 3, new=30, first_id=arrival * 100, batch=True) for arrival in (1, 2))
    s.add(first)
    s.add(second)
    for _ in range(3):
        step(s)
    s.add(sequence(3, 3, new=2, first_id=300))
    assert step(s) == [(1, 1), (3, 3)], "at once"
    assert second.output_len == 3
    step(s)
    assert step(s) == [(1, 1), (2, 2)], "its full page was still there"
    assert drain(s) == []
    assert (first.preemptions, second.preemptions) == (0, 1)
    assert (first.output_len, second.output_len) == (30, 30)


def test_pages_are_taken_from_batch_first() -> None:
    s = scheduler(pages=7, running=4, budget=32)
    s.add(sequence(1, 4, new=12, first_id=100, batch=True))
    step(s)
    s.add(sequence(2, 4, new=12, first_id=200))
    while not s.preemptions:
        step(s)
    assert [one.arrival for one in s.running] == [2]


def test_batch_does_not_yield_where_that_makes_too_little_room() -> None:
    s = scheduler(pages=8, running=4, budget=64)
    s.add(sequence(1, 16, new=8, first_id=100))
    s.add(sequence(2, 4, new=8, first_id=200, batch=True))
    step(s)
    s.add(sequence(3, 16, new=4, first_id=300))
    step(s)
    assert s.preemptions == 0


def test_batch_that_has_yielded_makes_some_tokens_before_it_yields_again() -> None:
    s = scheduler(running=1)
    batch = sequence(0, 3, new=100, batch=True)
    s.add(batch)
    step(s)
    arrival = longest = waited = 0
    while s.running or s.waiting:
        if s.running == [batch] and not s.waiting:
            arrival += 1
            s.add(sequence(arrival, 3, new=2, first_id=arrival * 100))
        step(s)
        waited = waited + 1 if any(not one.batch for one in s.waiting) else 0
        longest = max(longest, waited)
    assert batch.output_len == 100
    assert 100 / scheduling.YIELD_TOKENS - 1 <= batch.preemptions <= 100 / scheduling.YIELD_TOKENS + 1
    assert longest <= scheduling.YIELD_TOKENS


def test_a_shared_prefix_is_computed_once_but_never_across_salts() -> None:
    s = scheduler()
    s.add(sequence(1, 11))
    step(s)
    same, salted = sequence(2, 11), sequence(3, 11, salt="other tenant")
    s.add(same)
    s.add(salted)
    chunks = dict(step(s))
    assert chunks[2] == 3
    assert chunks[3] == 11
    assert (same.cached_prompt_tokens, salted.cached_prompt_tokens) == (8, 0)
    assert same.pages[:2] == s.running[0].pages[:2]


def test_shared_pages_count_as_room() -> None:
    s = scheduler(pages=5)
    s.add(sequence(1, 11, new=2))
    step(s)
    s.add(sequence(2, 12, new=1))
    assert dict(step(s))[2] == 4, "one page of its own, and one of slack for the other"


def remembered(s: Scheduler, one: Sequence) -> int:
    """How many of a sequence's pages a request with the same prompt would find."""
    return len(s.pool.lookup(one.page_hashes))


def test_who_waits_keeps_no_page_from_being_given_away() -> None:
    s = scheduler(pages=10)
    old, new = sequence(1, 12, new=1), sequence(2, 12, new=1, first_id=200)
    for one in (old, new):
        s.add(one)
        step(s)
    running = sequence(3, 14, new=14, first_id=400)
    s.add(running)
    step(s)
    s.add(sequence(4, 33, new=1))  # it begins as the old one did
    for _ in range(5):
        assert step(s) == [(3, 1)]
    assert remembered(s, old) < 3, "used by nobody for the longest time"
    assert remembered(s, new) == 3


def test_who_waits_for_a_place_is_not_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    s = scheduler(running=1)
    s.add(sequence(1, 3))
    step(s)
    waiting = sequence(2, 12, first_id=200)
    s.add(waiting)
    monkeypatch.setattr(s.pool, "lookup", None)
    assert step(s) == [(1, 1)]
    assert waiting.page_hashes == []


def test_a_prompt_that_is_cached_whole_still_computes_its_last_token() -> None:
    s = scheduler()
    s.add(sequence(1, 8))
    step(s)
    s.add(sequence(2, 8))
    assert dict(step(s))[2] == 4


@settings(max_examples=cases(100, exploring=1000), deadline=None)
@given(
    requests=st.lists(
        st.tuples(
            st.integers(1, 24),
            st.integers(1, 16),
            st.integers(0, 3),
            st.integers(0, 6),
            st.booleans(),
            st.booleans(),
            st.sampled_from(["", "a", "b"]),
            st.booleans(),
        ),
        min_size=1,
        max_size=12,
    ),
    pages=st.integers(10, 24),
    running=st.integers(1, 6),
    budget=st.integers(1, 20),
    cancelled=st.sets(st.integers(0, 11)),
    in_runs=st.booleans(),
    pace=st.none() | st.integers(1, 8),
)
def test_every_request_finishes_and_every_page_comes_back(
    requests: list[tuple[int, int, int, int, bool, bool, str, bool]],
    pages: int,
    running: int,
    budget: int,
    cancelled: set[int],
    in_runs: bool,
    pace: int | None,
) -> None:
    s = scheduler(pages, running, budget, in_runs=in_runs, pace=pace)
    sequences = [
        sequence(
            i, prompt, new, first_id=10 * family, delivered=new // 2 if moved else 0, isolated=suspect, tenant=of,
            batch=low,
        )
        for i, (prompt, new, family, _, moved, suspect, of, low) in enumerate(requests)
    ]  # fmt: skip
    coming = sorted(zip((step for _, _, _, step, *_ in requests), sequences, strict=True), key=lambda pair: pair[0])
    for number in range(5_000):
        while coming and coming[0][0] <= number:
            s.add(coming.pop(0)[1])
        if number == 3:
            for one in (sequences[i] for i in cancelled if i < len(sequences)):
                if one in s.running or one in s.waiting:
                    s.remove(one)
        if not (s.running or s.waiting):
            if not coming:
                break
            continue
        preempted = [one for one in s.waiting if one.preemptions and not one.batch]
        begun = set(s.running)
        chunks = step(s)
        assert chunks, "work is left and nothing is planned"
        assert sum(tokens for _, tokens in chunks) <= max(budget, running)
        assert s.line.tokens == sum(len(one.token_ids) for one in s.waiting)
        assert not any(one in s.waiting for one in preempted) or all(
            one in begun or one.preemptions or one.request.output_token_ids for one in s.running
        ), "new work has begun before preempted work came back"
        holders: dict[int, int] = {}
        for one in s.running:
            assert len(one.pages) * PAGE >= one.computed
            for page in one.pages:
                holders[page] = holders.get(page, 0) + 1
        assert s.pool.used == len(holders)
    assert s.running == s.waiting == []
    assert s.pool.used == 0
    for i, one in enumerate(sequences):
        assert i in cancelled or one.output_len == requests[i][1]


def repeating(arrival: int, prompt: int = 9) -> Sequence:
    """It goes round in threes, each sequence in ids of its own."""
    one = sequence(arrival, prompt, new=40)
    ids = tuple(100 * arrival + place % 3 for place in range(prompt))
    return Sequence(replace(one.request, prompt_token_ids=ids), arrival)


def repeat(s: Scheduler, wrong: bool = False) -> dict[int, tuple[int, ...]]:
    """A step in which each complete sequence goes round: the drafts by arrival. `wrong`: no guess is called right."""
    chunks = s.schedule()
    complete = [chunk for chunk in chunks if chunk.completes]
    for chunk in chunks:
        s.mark_computed(chunk.sequence, chunk.tokens)
    for chunk in complete:
        one, right = chunk.sequence, 0 if wrong else len(chunk.draft)
        known = len(one.token_ids)
        one.token_ids.extend(100 * one.arrival + place % 3 for place in range(known, known + right + 1))
        s.accept_draft(one, right)
    return {chunk.sequence.arrival: chunk.draft for chunk in chunks}


def test_guesses_take_the_rows_that_are_empty() -> None:
    s = scheduler(running=6, budget=32, lookup=True)
    s.add(repeating(1))
    s.add(repeating(2))
    assert repeat(s) == {1: (), 2: ()}, "prefills don't guess"
    assert repeat(s) == {1: (101, 102), 2: (201, 202)}, "a step has at most as many rows as requests may run"
    s.add(repeating(3))
    assert repeat(s)[3] == ()
    assert sum(len(draft) for draft in repeat(s).values()) == 3


def test_a_step_indexes_few_ids_and_prompts_while_they_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "INDEXED_PER_STEP", 8)
    s = scheduler(running=12, budget=12, lookup=True)
    both = [repeating(1, prompt=30), repeating(2, prompt=20)]
    for one in both:
        s.add(one)
    indexed, drafts = [], []
    for _ in range(7):
        drafts.append({arrival for arrival, draft in repeat(s, wrong=True).items() if draft})
        indexed.append(sum(one.lookup._indexed for one in both if one.lookup))
    assert indexed == [8, 16, 24, 32, 40, 48, 56], "five steps computed the prompts"
    assert drafts == [set(), set(), set(), set(), {1}, {1}, {1, 2}]


def test_a_full_step_guesses_nothing() -> None:
    s = scheduler(running=2, budget=32, lookup=True)
    for arrival in (1, 2):
        s.add(repeating(arrival))
    for _ in range(3):
        assert repeat(s) == {1: (), 2: ()}


def test_prefills_take_the_budget_before_guesses_do() -> None:
    s = scheduler(running=12, budget=12, lookup=True)
    s.add(repeating(1))
    repeat(s)
    s.add(sequence(2, 30, first_id=500))
    assert repeat(s) == {1: (), 2: ()}
    assert repeat(s) == {1: (), 2: ()}
    assert len(repeat(s)[1]) == 3, "8 tokens of the prompt were left"


def test_guesses_preempt_nobody_and_leave_each_running_sequence_a_page() -> None:
    s = scheduler(pages=5, running=12, lookup=True)
    one = repeating(1, prompt=13)
    s.add(one)
    repeat(s)
    assert (len(one.pages), s.pool.available) == (4, 1)
    assert len(repeat(s)[1]) == 2, "as far as its own pages reach"
    assert s.preemptions == 0


def test_pages_of_wrong_guesses_are_given_back_and_never_shared() -> None:
    s = scheduler(pages=32, running=24, budget=32, lookup=True)
    one = repeating(1, prompt=12)
    s.add(one)
    repeat(s)
    for _ in range(6):
        assert len(repeat(s, wrong=True)[1]) >= PAGE, "beyond the end of a page"
        assert len(one.pages) == s.pool.used == -(-one.computed // PAGE)
        assert len(one.page_hashes) == one.computed // PAGE
    s.remove(one)
    assert s.pool.used == 0


class Contents:
    """What each slot of the cache holds: the ids that were computed into it, right or wrong, and under which salt."""

    def __init__(self) -> None:
        self.slots: dict[tuple[int, int], tuple[int, str]] = {}

    def write(self, chunk: Chunk) -> None:
        one = chunk.sequence
        ids = [*one.token_ids[one.computed : one.computed + chunk.tokens], *chunk.draft]
        for place, token_id in enumerate(ids, start=one.computed):
            self.slots[one.pages[place // PAGE], place % PAGE] = (token_id, one.request.cache_salt)

    def check(self, one: Sequence) -> None:
        for place, token_id in enumerate(one.token_ids[: one.computed]):
            found = self.slots[one.pages[place // PAGE], place % PAGE]
            assert found == (token_id, one.request.cache_salt), "somebody else's keys and values"


@settings(max_examples=cases(100, exploring=1000), deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.integers(1, 24), st.integers(1, 24), st.integers(1, 3), st.sampled_from(["", "tenant"])),
        min_size=1,
        max_size=10,
    ),
    pages=st.integers(12, 40),
    running=st.integers(1, 12),
    budget=st.integers(1, 20),
    cancelled=st.sets(st.integers(0, 9)),
    in_runs=st.booleans(),
    data=st.data(),
)
def test_the_cache_holds_the_tokens_of_its_sequences_however_guesses_turn_out(
    requests: list[tuple[int, int, int, str]],
    pages: int,
    running: int,
    budget: int,
    cancelled: set[int],
    in_runs: bool,
    data: st.DataObject,
) -> None:
    s, contents = scheduler(pages, running, budget, lookup=True, in_runs=in_runs), Contents()
    sequences = []
    for arrival, (prompt, new, alphabet, salt) in enumerate(requests):
        one = sequence(arrival, prompt, new, salt=salt)
        ids = tuple(place % (alphabet + 1) for place in range(prompt))
        sequences.append(Sequence(replace(one.request, prompt_token_ids=ids), arrival))
        s.add(sequences[-1])
    for number in range(2_000):
        if number == 5:
            for one in sequences:
                if one.arrival in cancelled and (one in s.running or one in s.waiting):
                    s.remove(one)
        if not (s.running or s.waiting):
            break
        chunks = s.schedule()
        assert chunks, "work is left and nothing is planned"
        assert sum(chunk.tokens + len(chunk.draft) for chunk in chunks) <= max(budget, running)
        assert sum(1 + len(chunk.draft) for chunk in chunks if chunk.completes) <= running
        complete = {chunk.sequence.arrival for chunk in chunks if chunk.completes}
        for chunk in chunks:
            contents.write(chunk)
        for chunk in chunks:
            s.mark_computed(chunk.sequence, chunk.tokens)
        for chunk in chunks:
            one = chunk.sequence
            if one.arrival not in complete:
                continue
            right = data.draw(st.integers(0, len(chunk.draft)))
            reason, kept = None, 0
            for token_id in (*chunk.draft[:right], data.draw(st.integers(0, 3))):
                kept += 1
                if (reason := one.append(token_id)) is not None:
                    break
            s.accept_draft(one, min(right, kept))
            assert len(one.pages) == -(-one.computed // PAGE)
            assert reason is not None or one.remaining == 1
            if reason is not None:
                s.remove(one)
        for one in s.running:
            contents.check(one)
        assert s.pool.used == len({page for one in s.running for page in one.pages})
    assert s.running == s.waiting == []
    assert s.pool.used == 0
    for one, (_, new, _, _) in zip(sequences, requests, strict=True):
        assert one.arrival in cancelled or one.output_len == new


def test_a_prompt_whose_logprobs_are_wanted_takes_the_rows_that_are_left() -> None:
    s = scheduler(pages=64, running=4, budget=16)
    decoding, scored, later = sequence(1, 3), sequence(2, 10, first_id=500), sequence(3, 6, first_id=900)
    scored.request = replace(scored.request, prompt_logprobs=0)
    scored = Sequence(scored.request, 2)
    s.add(decoding)
    assert [chunk.kept for chunk in s.schedule()] == [1]
    s.mark_computed(decoding, 3)
    decoding.append(7)
    s.add(scored)
    s.add(later)
    chunks = {chunk.sequence: chunk for chunk in s.schedule()}
    assert (chunks[scored].tokens, chunks[scored].scored) == (3, 3)
    assert (chunks[later].tokens, chunks[later].completes) == (5, False), "its last token needs a row"
    s.mark_computed(later, 5)
    chunks = {chunk.sequence: chunk for chunk in s.schedule()}
    assert chunks[later].completes, "it comes first in the next step"


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 4), st.booleans(), st.booleans()), min_size=1, max_size=12),
    st.integers(1, 5),
    st.integers(1, 24),
    st.booleans(),
)
@settings(max_examples=cases(100, exploring=1000), deadline=None)
def test_a_step_never_has_more_rows_than_sequences_may_run(
    asked: list[tuple[int, int, bool, bool]], running: int, budget: int, lookup: bool
) -> None:
    """Every sequence ends, and each position whose logits are wanted has exactly one row."""
    s = scheduler(pages=16, running=running, budget=budget, lookup=lookup)
    rows: dict[Sequence, list[int]] = {}
    for arrival, (prompt, new, scored, isolated) in enumerate(asked):
        made = sequence(arrival, prompt, max(new, 0 if scored else 1), first_id=arrival % 3, isolated=isolated)
        made = Sequence(replace(made.request, prompt_logprobs=0 if scored else None), arrival)
        rows[made] = []
        s.add(made)
    for _ in range(3_000):
        if not (s.running or s.waiting):
            break
        chunks = s.schedule()
        assert sum(chunk.kept for chunk in chunks) <= running
        for chunk in chunks:
            made, scored, completes = chunk.sequence, chunk.scored, chunk.completes
            first = max(made.computed, made.first_row)
            rows[made].extend(range(first, first + scored + completes))
            if scored and made.prompt_scores is not None:
                made.prompt_scores.add(torch.zeros(scored, 8), [0] * made.prompt_len)
            s.mark_computed(made, chunk.tokens)
            if chunk.draft:
                s.accept_draft(made, 0)
            if completes and (made.request.max_new_tokens == 0 or made.append(arrival_token(made))):
                s.remove(made)
    assert not s.running
    assert not s.waiting
    for made, kept in rows.items():
        first = 0 if made.request.prompt_logprobs is not None else made.prompt_len - 1
        assert kept == list(range(first, made.prompt_len + max(0, made.request.max_new_tokens - 1)))


def arrival_token(made: Sequence) -> int:
    """The same few ids again and again, so that guesses are made."""
    return made.output_len % 2
