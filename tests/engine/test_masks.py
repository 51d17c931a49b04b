"""Masks that are late, grammars whose lexers are full, and grammars that break: each concerns its own sequence only."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from typing import Any

import pytest
from llguidance import LLMatcher, LLParserLimits
from msgspec.structs import replace
from small_vocabulary import EOS, grammar_of, ids_of, loaded, small_vocabulary
from structured_requests import PERSON, constrained, ended, regex
from tiny_models import VOCAB, collect, request_for, tokens_of, until

from serve_app import grammar
from serve_app.core import Failure, FailureCode, TokenBatch
from serve_app.engine import engine as engine_module
from serve_app.engine import grammars, masks
from serve_app.engine.constraint import Constraint, PendingMask
from serve_app.engine.engine import Engine
from serve_app.engine.masks import MaskBuilder, Place

MakeEngine = Callable[..., Engine]
MARKED = {"stop_token_ids": (EOS, 126)}
"""Of the request whose grammar the test disturbs. No token of the tests' outputs is 126."""


class Panic(BaseException):
    """As pyo3's PanicException."""


def is_marked(constraint: Constraint) -> bool:
    return len(constraint._stop_bits) > 1


async def outputs_of(engine: Engine, requests: Sequence[Any]) -> list[Any]:
    return [ended(replies) for replies in await asyncio.gather(*(collect(engine, one) for one in requests))]


PEOPLE = [constrained(grammar_of(PERSON), seed=seed, new_tokens=40, prompt=[5] * (1 + 9 * seed)) for seed in range(4)]


@pytest.mark.parametrize("settings", [{}, {"max_step_tokens": 13, "max_running": 3}])
async def test_tokens_are_the_same_though_no_mask_is_waited_for(
    settings: dict[str, Any], make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [*PEOPLE, request_for([9] * 20, 40), replace(PEOPLE[0], prompt_logprobs=1)]
    expected = await outputs_of(make_engine(vocabulary=loaded()), asked)
    is_there, chance, late = masks.StepMasks._is_there, random.Random(1), list[Constraint]()

    def late_at_times(self: masks.StepMasks, constraint: Constraint, mask: PendingMask) -> bool:
        if constraint.pending is None and chance.random() < 0.4:
            constraint.pending, constraint.watched = mask, chance.randrange(3)
            late.append(constraint)
            return False
        return is_there(self, constraint, mask)

    monkeypatch.setattr(masks.StepMasks, "_is_there", late_at_times)
    engine = make_engine(vocabulary=loaded(), **settings)
    assert await outputs_of(engine, asked) == expected
    assert len(set(late)) == len(PEOPLE) + 1


async def test_nobody_waits_for_a_mask_that_is_late(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    build = MaskBuilder._build_together

    def slow(self: MaskBuilder, places: Sequence[Place]) -> Any:
        if any(is_marked(place.constraint) for place in places):
            assert go_on.wait(20)
        return build(self, places)

    request = constrained(grammar_of(PERSON), **MARKED)
    expected = ended(await collect(make_engine(vocabulary=loaded()), request))
    monkeypatch.setattr(MaskBuilder, "_build_together", slow)
    monkeypatch.setattr(masks, "GRACE_S", 0.01)
    monkeypatch.setattr(masks, "ALONE_GRACE_S", 0.01)
    engine = make_engine(vocabulary=loaded())
    held = asyncio.create_task(collect(engine, request))
    await until(lambda: any(sequence.held for sequence in engine._core.scheduler.running))
    assert len(await tokens_of(engine, request_for([9], 40))) == 40
    left = engine.generate(replace(request, request_id="left"))
    leaving = asyncio.ensure_future(anext(left))
    await until(lambda: len(engine._core.scheduler.running) == 2)
    leaving.cancel()
    await asyncio.wait({leaving})
    await until(lambda: len(engine._core.scheduler.running) == 1)
    assert not held.done()
    go_on.set()
    assert ended(await held) == expected


def test_a_watched_grammar_is_waited_for_and_comes_back_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "GRACE_S", 20)
    monkeypatch.setattr(masks, "WATCHED_GRACE_S", 20)
    builder, vocabulary = MaskBuilder(VOCAB, threads=1), small_vocabulary()
    watched, other = (
        Constraint(vocabulary, grammar.compile_grammar(vocabulary, regex("ab*")), constrained("")) for _ in range(2)
    )
    watched.watched = 2
    for left in (1, 0, 0):
        found = builder.start([Place(0, watched, ()), Place(1, other, ())]).collect(others=True)
        assert (found.late, watched.watched) == (frozenset(), left)
        assert (found.words[0] == found.words[1]).all()


async def test_sequences_of_one_grammar_do_not_use_up_each_others_lexer(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = regex("[a-z]*[a-m][a-z]{10}")
    asked = [constrained(full, 30, seed) for seed in range(4)]
    expected = await outputs_of(make_engine(vocabulary=loaded()), asked)
    few = LLParserLimits(max_lexer_states=200, verbose_errors=False)
    monkeypatch.setattr(grammar, "LIMITS", few)
    compiled: list[str] = []
    compile_it = grammars.compile_grammar
    monkeypatch.setattr(
        grammars, "compile_grammar", lambda vocabulary, text: (compiled.append(text), compile_it(vocabulary, text))[1]
    )
    engine = make_engine(vocabulary=loaded())
    for request, output in zip(asked, expected, strict=True):
        assert ended(await collect(engine, request)) == output, "one after the other"
    assert len(compiled) > 2, "no lexer is full"
    assert await outputs_of(engine, asked) == expected, "together"
    ids, reason = expected[0]
    begun = replace(asked[0], output_token_ids=tuple(ids[:20]))
    assert ended(await collect(engine, begun)) == (ids[20:], reason), "continued"


@pytest.mark.parametrize("where", ["end_rows", "advance"])
async def test_a_grammar_that_breaks_ends_its_own_sequence_only(
    where: str, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = await outputs_of(make_engine(vocabulary=loaded()), PEOPLE)
    end_rows, recover = Constraint.end_rows, Constraint.recover

    def breaking(self: Constraint, *arguments: Any) -> None:
        if is_marked(self) and len(self._ids) > 3:
            raise Panic("a bug")
        end_rows(self, *arguments)

    def recovering(self: Constraint) -> None:
        recover(self)
        if is_marked(self):
            raise Panic("a bug")

    if where == "end_rows":
        monkeypatch.setattr(Constraint, "end_rows", breaking)
    else:
        few = LLParserLimits(max_lexer_states=200, verbose_errors=False)
        monkeypatch.setattr(grammar, "LIMITS", few)
        monkeypatch.setattr(Constraint, "recover", recovering)
    engine = make_engine(vocabulary=loaded())
    broken = asyncio.create_task(collect(engine, constrained(regex("[a-z]*[a-m][a-z]{10}"), 90, **MARKED)))
    if where == "end_rows":
        assert await outputs_of(engine, PEOPLE) == expected
    *_, failure = await broken
    assert failure == Failure(FailureCode.INVALID_REQUEST, "the output can't go on within the grammar: Panic: a bug")
    assert len(await tokens_of(engine, request_for([9], 5))) == 5


async def test_requests_whose_grammar_is_compiled_count_as_waiting_and_keep_their_deadline(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()

    def slow(*arguments: Any) -> Any:
        assert go_on.wait(20)
        return compile_grammar(*arguments)

    compile_grammar = grammars.compile_grammar
    monkeypatch.setattr(grammars, "compile_grammar", slow)
    monkeypatch.setattr(engine_module, "HEARTBEAT_S", 0.01)
    engine = make_engine(vocabulary=loaded(), max_running=2, max_waiting=1)
    [*_, late] = await collect(engine, constrained(regex("abc"), remaining_s=0.02))
    assert isinstance(late, Failure)
    assert late.code is FailureCode.DEADLINE_EXCEEDED
    assert engine.stats().waiting == 0
    asked = [asyncio.create_task(collect(engine, constrained(regex("abc")))) for _ in range(3)]
    await until(lambda: engine.stats().waiting == 3)
    [refused] = await collect(engine, constrained(regex("abc")))
    assert isinstance(refused, Failure)
    assert refused.code is FailureCode.OVERLOADED
    go_on.set()
    for replies in await asyncio.gather(*asked):
        assert isinstance(replies[-1], TokenBatch)
    assert engine.stats().waiting == 0


async def test_an_engine_that_ends_says_so_to_requests_whose_grammar_is_compiled(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "HEARTBEAT_S", 0.01)
    engine = make_engine(vocabulary=loaded())
    engine._grammars._vocabulary = type(loaded())()  # never loaded
    asked = asyncio.create_task(collect(engine, constrained(regex("abc"))))
    await until(lambda: engine.stats().waiting == 1)
    await asyncio.to_thread(engine.stop)
    failure = (await asked)[-1]
    engine._grammars._vocabulary.cancel()
    assert isinstance(failure, Failure)
    assert failure.code is FailureCode.NOT_READY


def test_masks_that_were_late_are_each_their_own_constraints_in_any_order() -> None:
    builder, vocabulary = MaskBuilder(VOCAB, threads=1), small_vocabulary()
    one, other = (
        Constraint(vocabulary, grammar.compile_grammar(vocabulary, regex(pattern)), constrained("")) for pattern in "ab"
    )
    expected = builder.start([Place(0, one, ()), Place(1, other, ())]).collect(others=True)
    assert (expected.words[0] != expected.words[1]).any()
    joint = builder.start([Place(0, one, ()), Place(1, other, ())])
    for constraint, mask in zip((one, other), joint._pending, strict=True):
        constraint.pending = mask
    turned = builder.start([Place(0, other, ()), Place(1, one, ())]).collect(others=True)
    assert (turned.words == expected.words[::-1]).all()


def test_a_draft_that_leads_into_a_dead_end_costs_the_output_nothing() -> None:
    builder, vocabulary = MaskBuilder(VOCAB, threads=1), small_vocabulary()
    text = json.dumps({"grammars": [{"lark_grammar": 'start: "a" | "b" X\nX: /x/ & /y/'}]})

    def compiled() -> LLMatcher:
        return grammar.compile_grammar(vocabulary, text)

    constraint = Constraint(vocabulary, compiled(), constrained(""), compiled)
    expected = builder.start([Place(0, constraint, ())]).collect(others=True)
    (b,) = ids_of("b")
    place = Place(0, constraint, (b,))
    assert constraint.allowed(place.draft) == 1
    found = builder.start([place]).collect(others=True)
    assert found.late == {0, 1}, "its grammar is compiled anew"
    assert constraint.pending is not None
    wait({constraint.pending.future}, timeout=20)
    again = builder.start([Place(0, constraint, ())]).collect(others=True)
    assert (again.words == expected.words).all()
    assert not again.ended


def test_a_replay_accepts_what_the_output_was_allowed_to_be() -> None:
    """Without masks between its ids an output uses up the fuel of the lexer."""
    vocabulary = small_vocabulary()
    pattern = regex("([a-z ]{0,4}[aeiou ][a-z ]{0,4}){0,5}")
    ids = ids_of("the cat sat on the mat and then went")

    def compiled() -> LLMatcher:
        return grammar.compile_grammar(vocabulary, pattern)

    live = Constraint(vocabulary, compiled(), constrained(pattern), compiled)
    for token_id in ids:
        live.matcher.compute_bitmask()
        live.advance([token_id])
    assert not live.has_error
    later = Constraint(vocabulary, compiled(), constrained(pattern), compiled)
    grammars._replay(later, constrained(pattern, output_token_ids=tuple(ids)))
    assert later.matcher.compute_bitmask() == live.matcher.compute_bitmask()
    assert not later.has_error


def test_an_output_that_a_recovery_finds_complete_ends() -> None:
    builder, vocabulary = MaskBuilder(VOCAB, threads=1), small_vocabulary()

    def compiled() -> LLMatcher:
        return grammar.compile_grammar(vocabulary, regex("a"))

    constraint = Constraint(vocabulary, compiled(), constrained(""), compiled)
    constraint.advance(ids_of("a"))
    constraint.fail(Panic("broken"))
    assert builder.start([Place(0, constraint, ())]).collect(others=True).late == {0}
    assert constraint.pending is not None
    wait({constraint.pending.future}, timeout=20)
    found = builder.start([Place(0, constraint, ())]).collect(others=True)
    assert (found.ended, constraint.failed) == ([0], None)
