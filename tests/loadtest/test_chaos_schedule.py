"""The schedule of faults and the clients of a chaos run: the same for the same seed, and sound for any."""

from __future__ import annotations

from collections import Counter
from importlib import import_module

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.chaos import service_config
from loadtest.faults import changed
from loadtest.schedule import MIX, Fault, plan
from loadtest.workload import LONGEST_ANSWER_TOKENS, Kind, Mode, Wire, questions, visits
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
    assert all("seed" in question.body and question.max_tokens <= LONGEST_ANSWER_TOKENS for question in asked)
    settings = ("stop", "logprobs", "min_tokens", "repetition_penalty", "presence_penalty", "top_p", "top_k", "n")
    settings += ("include", "tools", "response_format")
    assert all(any(setting in body for body in bodies) for setting in settings)
    assert 10 < sum(body["temperature"] == 0 for body in bodies) < 54
    assert not any({"logprobs", "min_tokens", "n"} & q.body.keys() for q in asked if q.wire is Wire.NATIVE)


def test_the_kinds_have_their_shares() -> None:
    asked = questions(1, 60)
    shares = Counter(question.kind for question in asked)
    assert shares[Kind.STRUCTURED] == shares[Kind.TOOLS] == 15
    assert shares[Kind.RESPONSES] == shares[Kind.ANTHROPIC] == shares[Kind.GRPC] == 6
    coming = Counter(asked[visit.question].kind for visit in visits(1, 300, 285, asked))
    assert coming == {kind: 5 * count for kind, count in shares.items()}
    assert {question.kind for question in questions(1, 12)} == set(Kind), "few streams have some of each"
    assert {question.kind for question in questions(1, 60, [Kind.GRPC, Kind.PLAIN])} == {Kind.GRPC, Kind.PLAIN}


def test_a_grammar_is_neither_cut_by_a_stop_string_nor_held_open() -> None:
    forced = [question for question in questions(1, 300) if {"tools", "response_format"} & question.body.keys()]
    assert len(forced) > 150
    assert not any({"stop", "stop_sequences", "min_tokens"} & question.body.keys() for question in forced)


def test_half_of_the_clients_come_shortly_before_a_fault() -> None:
    coming = visits(1, 300, 285, questions(1, 64), [50.0, 100.0])
    near = [visit for visit in coming if any(0 <= fault_s - visit.at_s <= 3 for fault_s in (50.0, 100.0))]
    assert 120 < len(near) < 180
    assert [visit.at_s for visit in coming] == sorted(visit.at_s for visit in coming)


def test_only_clients_that_resume_drop_and_only_some_protocols_come_whole() -> None:
    asked = questions(1, 64)
    coming = visits(1, 300, 285, asked)
    assert {visit.mode for visit in coming} == set(Mode)
    assert any(visit.drops for visit in coming)
    assert all(visit.mode is Mode.RESUME for visit in coming if visit.drops)
    assert all(asked[visit.question].may_be_whole for visit in coming if visit.mode is Mode.WHOLE)
    assert not any(question.may_be_whole for question in asked if question.wire in (Wire.NATIVE, Wire.GRPC))


def test_a_response_outlives_its_connection_only_in_the_background() -> None:
    one = next(question for question in questions(1, 60) if question.kind is Kind.RESPONSES)
    assert one.asked(Mode.RESUME)["background"] is True
    assert one.asked(Mode.PLAIN)["store"] is False
    assert "stream" not in one.asked(Mode.WHOLE)


@pytest.mark.parametrize("batch_invariant", [True, False])
def test_the_config_is_one_that_the_service_takes(batch_invariant: bool) -> None:
    config = service_config(None, 8123, batch_invariant=batch_invariant)
    served = AppConfig.model_validate(config["applications"][0]["args"])
    assert served.engine.batch_invariant is batch_invariant
    assert served.model_server.num_replicas == served.ingress.num_replicas == 2
    assert config["http_options"]["host"] == "127.0.0.1"
    assert served.responses.expiry_s == served.streams.expiry_s, "both count as journals that are kept"
    assert "grpc_options" not in config
    options = service_config(None, 8123, batch_invariant=True, grpc_port=9123)["grpc_options"]
    assert options["port"] == 9123
    module, _, name = options["grpc_servicer_functions"][0].rpartition(".")
    assert callable(getattr(import_module(module), name))


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
