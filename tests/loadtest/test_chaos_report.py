"""The report: who may see a connection error, what a pause is, and when the run has failed."""

from __future__ import annotations

from typing import Any

from loadtest.chaos_client import Outcome
from loadtest.chaos_report import (
    Judged,
    judge_outcome,
    kept,
    pauses_after,
    pauses_of_resumes,
    summary,
    table,
    unexcused,
)
from loadtest.faults import Injected
from loadtest.schedule import Fault
from loadtest.verdicts import Answer, Verdict
from loadtest.workload import Mode, Question, Visit, Wire

ANSWER = Answer(("text",), ("stop",), 3, 2, token_ids=(1, 2))
QUESTION = Question(Wire.NATIVE, {"max_tokens": 2, "seed": 1})
IDLE = {"ok": True, "wrong": []}


def outcome(mode: Mode = Mode.PLAIN, answer: Answer | None = ANSWER, **seen: Any) -> Outcome:
    return Outcome(Visit(0, 0.0, 0, mode), 0.0, 10.0, answer, **seen)


def judged(one: Outcome, *, moved: bool = False) -> Judged:
    return judge_outcome(one, QUESTION, ANSWER, exact=True, moved=moved)


def figures(outcomes: list[Outcome], injected: list[Injected]) -> dict[str, Any]:
    return {**summary([judged(one) for one in outcomes], injected, exact=True), "idle": IDLE, "proxy_outages_s": []}


def test_a_good_run_keeps_the_promises_and_prints() -> None:
    run = figures([outcome(), outcome(Mode.RESUME, cut_s=[3.0])], [Injected(Fault.KILL_MODEL, 5.0, 1, 1)])
    assert kept(run)
    assert "| **identical** | **2** (100.0%) |" in table(run)
    assert not kept(run | {"idle": {"ok": False, "wrong": ["proxy has 900 fds, 40 before"]}})


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
    assert pauses_of_resumes([judged(own)], own=False) == []
    freeze = Injected(Fault.FREEZE_MODEL, 5.5, 1, 1)
    assert pauses_after([judged(one, moved=True)], [kill], [kill, freeze]) == []
    assert pauses_after([judged(one, moved=True)], [kill], [kill, Injected(Fault.KILL_PROXY, 9.0, 1)]) == [6.6 - 5.1]
