"""The schedule of faults and the clients of a chaos run: the same for the same seed, and sound for any."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.chaos import service_config
from loadtest.faults import changed
from loadtest.schedule import MIX, Fault, plan
from loadtest.workload import LONGEST_ANSWER_TOKENS, Mode, Wire, questions, visits
from serve_app.config import AppConfig


def test_a_seed_decides_everything() -> None:
    asked = questions(1, 64)
    assert questions(1, 64) == asked
    assert visits(1, 300, 285, asked, [50.0]) == visits(1, 300, 285, asked, [50.0])
    assert plan(1, 40, 300) == plan(1, 40, 300)
    assert questions(2, 64) != asked
    assert plan(2, 40, 300) != plan(1, 40, 300)


def test_forty_faults_are_the_mix() -> None:
    assert Counter(scheduled.fault for scheduled in plan(7, sum(MIX.values()), 300)) == MIX


@given(seed=st.integers(0, 1000), count=st.integers(0, 120), seconds=st.floats(10, 3600))
def test_faults_come_in_order_within_the_load(seed: int, count: int, seconds: float) -> None:
    schedule = plan(seed, count, seconds)
    times = [scheduled.at_s for scheduled in schedule]
    assert len(schedule) == count
    assert times == sorted(times)
    assert all(0.04 * seconds <= at_s <= 0.91 * seconds for at_s in times)
    extra = 0
    for scheduled in schedule:
        extra += {Fault.SCALE_UP: 1, Fault.SCALE_DOWN: -1}.get(scheduled.fault, 0)
        assert extra in (0, 1)


def test_few_faults_begin_with_the_commonest() -> None:
    assert [scheduled.fault for scheduled in plan(1, 1, 60)] == [Fault.KILL_MODEL]
    assert {Fault.KILL_MODEL, Fault.KILL_INGRESS} <= {scheduled.fault for scheduled in plan(1, 5, 60)}


def test_the_questions_cover_what_a_continuation_must_keep() -> None:
    asked = questions(1, 64)
    bodies = [question.body for question in asked]
    assert {question.wire for question in asked} == set(Wire)
    assert all("seed" in body and body["max_tokens"] <= LONGEST_ANSWER_TOKENS for body in bodies)
    settings = ("stop", "logprobs", "min_tokens", "repetition_penalty", "presence_penalty", "top_p", "top_k", "n")
    assert all(any(setting in body for body in bodies) for setting in settings)
    assert 10 < sum(body["temperature"] == 0 for body in bodies) < 54
    assert not any({"logprobs", "min_tokens", "n"} & q.body.keys() for q in asked if q.wire is Wire.NATIVE)


def test_half_of_the_clients_come_shortly_before_a_fault() -> None:
    coming = visits(1, 300, 285, questions(1, 64), [50.0, 100.0])
    near = [visit for visit in coming if any(0 <= fault_s - visit.at_s <= 3 for fault_s in (50.0, 100.0))]
    assert 120 < len(near) < 180
    assert [visit.at_s for visit in coming] == sorted(visit.at_s for visit in coming)


def test_only_clients_that_resume_drop_and_only_chats_come_whole() -> None:
    asked = questions(1, 64)
    coming = visits(1, 300, 285, asked)
    assert {visit.mode for visit in coming} == set(Mode)
    assert any(visit.drops for visit in coming)
    assert all(visit.mode is Mode.RESUME for visit in coming if visit.drops)
    assert all(asked[visit.question].wire is Wire.CHAT for visit in coming if visit.mode is Mode.WHOLE)


@pytest.mark.parametrize("batch_invariant", [True, False])
def test_the_config_is_one_that_the_service_takes(batch_invariant: bool) -> None:
    config = service_config(None, 8123, batch_invariant=batch_invariant)
    served = AppConfig.model_validate(config["applications"][0]["args"])
    assert served.engine.batch_invariant is batch_invariant
    assert served.model_server.num_replicas == served.ingress.num_replicas == 2
    assert config["http_options"]["host"] == "127.0.0.1"


def test_scaling_leaves_the_arguments_alone_and_a_redeploy_changes_them() -> None:
    config = service_config(None, 8123, batch_invariant=True)
    before = config["applications"][0]["args"]
    scaled = changed(config, redeploy=False, extra_models=1)["applications"][0]
    assert scaled["args"] == before
    assert scaled["deployments"] == [{"name": "ModelServer", "num_replicas": 3}]
    first = changed(config, redeploy=True, extra_models=0)
    second = changed(first, redeploy=True, extra_models=0)
    arguments = [each["applications"][0]["args"] for each in (config, first, second)]
    assert arguments[0] != arguments[1] != arguments[2]
    for served in arguments[1:]:
        AppConfig.model_validate(served)
