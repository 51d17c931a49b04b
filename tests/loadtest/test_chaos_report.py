"""The report: who may see a connection error, what a pause is, and when the run has failed."""

from __future__ import annotations

from typing import Any

import pytest

from loadtest.chaos_report import (
    Judged,
    judge_outcome,
    kept,
    pauses_after,
    pauses_of_resumes,
    summary,
    table,
    unexcused,
    untested,
)
from loadtest.faults import Injected
from loadtest.outcome import Outcome
from loadtest.schedule import Fault
from loadtest.verdicts import Answer, Verdict
from loadtest.workload import Kind, Mode, Question, Visit, Wire

ANSWER = Answer(("text",), ("stop",), 3, 2, token_ids=(1, 2))
QUESTION = Question(Wire.NATIVE, {"max_tokens": 2, "seed": 1})
IDLE = {"ok": True, "wrong": []}


def outcome(mode: Mode = Mode.PLAIN, answer: Answer | None = ANSWER, **seen: Any) -> Outcome:
    return Outcome(Visit(0, 0.0, 0, mode), 0.0, 10.0, answer, **seen)


def judged(one: Outcome, *, moved: bool = False) -> Judged:
    return judge_outcome(one, QUESTION, ANSWER, batch_invariant=True, moved=moved)


def figures(
    outcomes: list[Outcome], injected: list[Injected], asked_for: list[Fault] | None = None, *, moved: bool = False
) -> dict[str, Any]:
    """Of a run whose faults were all carried out, unless `asked_for` has more of them."""
    asked_for = [fault.fault for fault in injected] if asked_for is None else asked_for
    found = summary([judged(one, moved=moved) for one in outcomes], injected, asked_for, batch_invariant=True)
    return {**found, "idle": IDLE, "proxy_outages_s": [5.0] * found["faults_by_kind"][Fault.KILL_PROXY]}


def test_a_good_run_keeps_the_promises_and_prints() -> None:
    run = figures([outcome(), outcome(Mode.RESUME, cut_s=[3.0])], [Injected(Fault.KILL_MODEL, 5.0, 1, 1)])
    assert kept(run)
    assert "| **identical** | **2** (100.0%) |" in table(run)
    assert not kept(run | {"idle": {"ok": False, "wrong": ["proxy has 900 fds, 40 before"]}})


def test_each_kind_has_its_own_counts() -> None:
    tools = Question(Wire.CHAT, {"max_tokens": 2}, Kind.TOOLS)
    lost = judge_outcome(outcome(answer=None, failure="gone"), tools, ANSWER, batch_invariant=True, moved=True)
    found = summary([judged(outcome()), lost], [], [], batch_invariant=True)
    assert (
        found["kinds"]["tools"] | {"streams": 1, "lost": 1, "identical": 0, "continued": 1} == found["kinds"]["tools"]
    )
    assert found["kinds"]["plain"]["identical"] == found["kinds"]["plain"]["streams"] == 1
    assert found["failures"][0]["kind"] is Kind.TOOLS
    printed = table({**found, "idle": IDLE, "proxy_outages_s": []})
    assert "| - tools | 1: 0 identical, 1 lost, 1 continued, 0 resumes |" in printed
    assert "grpc" not in printed


def test_a_run_whose_faults_were_skipped_shows_nothing() -> None:
    asked_for = [Fault.KILL_MODEL] * 30 + [Fault.KILL_PROXY] * 10
    run = figures([outcome()], [], asked_for)
    assert untested(run) == [
        f"never carried out: {Fault.KILL_MODEL} (asked for: 30)",
        f"never carried out: {Fault.KILL_PROXY} (asked for: 10)",
        "only 0 of 40 faults were carried out",
    ]
    assert not kept(run)
    assert "| faults | 0 of 40 that were asked for |" in table(run)


@pytest.mark.parametrize(("skipped", "enough"), [(0, True), (4, True), (5, False)])
def test_a_few_faults_may_find_nothing_to_hit(skipped: int, enough: bool) -> None:
    done = [Injected(Fault.REDEPLOY, 20.0 * number, 1) for number in range(40 - skipped)]
    run = figures([outcome()], done, [Fault.REDEPLOY] * 40)
    assert kept(run) is enough
    assert untested(run) == ([] if enough else ["only 35 of 40 faults were carried out"])


def test_a_kind_of_fault_that_was_never_carried_out_is_missed_among_many() -> None:
    done = [Injected(Fault.REDEPLOY, 20.0 * number, 1) for number in range(37)]
    run = figures([outcome()], done, [Fault.REDEPLOY] * 37 + [Fault.KILL_PROXY] * 3)
    assert untested(run) == [f"never carried out: {Fault.KILL_PROXY} (asked for: 3)"]
    assert not kept(run)


def test_a_proxy_that_stays_away_is_a_failure() -> None:
    run = figures([outcome()], [Injected(Fault.KILL_PROXY, 5.0, 1)])
    assert kept(run)
    assert not kept(run | {"proxy_outages_s": []})


def test_hits_that_leave_no_trace_show_nothing() -> None:
    kills = [Injected(Fault.KILL_MODEL, 20.0 * number, 1, peers=1) for number in range(1, 4)]
    untouched = outcome(arrivals_s=[19.0, 19.5, 20.5, 20.6])
    assert untested(figures([untouched], kills)) == [
        "no stream was continued, after 3 hits of model replicas",
        "no pause was seen, after 3 kills of a model replica, apart from other faults",
    ]
    assert untested(figures([untouched], kills[:2])) == [], "two may find a replica that has nothing to lose"
    assert untested(figures([untouched], kills, moved=True)) == []
    elsewhere = outcome(arrivals_s=[1.0, 2.0])
    assert untested(figures([elsewhere], kills, moved=True)) == [
        "no pause was seen, after 3 kills of a model replica, apart from other faults"
    ]
    crowd = [Injected(Fault.KILL_PROXY, 20.0 * number + 1, 1) for number in range(1, 4)]
    assert untested(figures([elsewhere], kills + crowd, moved=True)) == [], "whose doing a pause was can't be told"
    dropped = outcome(Mode.RESUME, cut_s=[1.0, 2.0, 3.0])
    assert untested(figures([dropped], [])) == ["none has resumed, after 3 drops by clients"]
    dropped.resumed = 3
    assert kept(figures([dropped], []))


def test_no_answer_is_lost_and_says_why() -> None:
    one = judged(outcome(answer=None, failure="error event: replica_lost"))
    assert one.verdict is Verdict.LOST
    assert "replica_lost" in one.reason
    assert not kept(figures([one.outcome], []))


def test_wire_faults_outweigh_a_text_that_is_right() -> None:
    assert judged(outcome(faults=["event 3 where 4 was due"], repeated_events=True)).verdict is Verdict.DUPLICATED
    assert judged(outcome(faults=["event 5 where 4 was due"])).verdict is Verdict.LOST


def test_a_connection_error_is_excused_only_by_the_death_of_an_ingress_or_a_proxy_shortly_before() -> None:
    broken = outcome(broken=[(10.0, "ReadError: ")])
    assert unexcused(broken, [Injected(Fault.KILL_PROXY, 9.0, 1)]) == []
    assert unexcused(broken, [Injected(Fault.KILL_INGRESS, 9.5, 1, 1)]) == []
    for innocent in (Fault.KILL_MODEL, Fault.REDEPLOY, Fault.SCALE_DOWN, Fault.FREEZE_INGRESS):
        assert unexcused(broken, [Injected(innocent, 9.5, 1, 1)])
    assert unexcused(broken, [Injected(Fault.KILL_PROXY, 11.0, 1)])
    run = figures([broken], [Injected(Fault.KILL_PROXY, 9.0, 1)])
    assert kept(run)
    assert run["clean_connection_errors"] == 1
    assert not kept(figures([broken], [Injected(Fault.REDEPLOY, 9.0, 1)]))


def test_a_body_that_ends_as_if_whole_is_no_clean_error() -> None:
    sly = outcome(broken=[(10.0, "Broken: the body ended, as if it were whole, before the last event")])
    assert not kept(figures([sly], [Injected(Fault.KILL_INGRESS, 9.0, 1, 1)]))


def test_the_pause_after_a_kill_is_that_of_streams_that_moved() -> None:
    kill = Injected(Fault.KILL_MODEL, 5.0, 1, peers=1)
    one = outcome(arrivals_s=[4.0, 4.9, 5.1, 6.6, 6.7, 9.9])
    assert pauses_after([judged(one, moved=True)], [kill]) == [6.6 - 5.1]
    assert pauses_after([judged(one)], [kill]) == []
    waiting = outcome(arrivals_s=[2.0, 6.6, 6.7])  # for something else, since before the kill
    assert pauses_after([judged(waiting, moved=True)], [kill]) == []
    own = outcome(Mode.RESUME, arrivals_s=[4.9, 6.6], cut_s=[5.5])
    assert pauses_after([judged(own, moved=True)], [kill]) == []
    assert pauses_of_resumes([judged(own)], own=True) == [6.6 - 4.9]
    assert pauses_of_resumes([judged(own)], own=True, since_it_went=True) == [6.6 - 5.5]
    assert pauses_of_resumes([judged(own)], own=False) == []
    lost = outcome(Mode.RESUME, arrivals_s=[4.9, 6.6, 8.0], broken=[(5.5, "reset"), (6.0, "refused")])
    assert pauses_of_resumes([judged(lost)], own=False) == [6.6 - 4.9]
    assert pauses_of_resumes([judged(lost)], own=False, since_it_went=True) == [6.6 - 5.5]
    freeze = Injected(Fault.FREEZE_MODEL, 5.5, 1, 1)
    assert pauses_after([judged(one, moved=True)], [kill], [kill, freeze]) == []
    assert pauses_after([judged(one, moved=True)], [kill], [kill, Injected(Fault.KILL_PROXY, 9.0, 1)]) == [6.6 - 5.1]
