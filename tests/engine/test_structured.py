"""Outputs under a grammar: they match it, end, and are the same tokens however they were made."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from exploring import cases
from hypothesis import example, given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher
from msgspec.structs import replace
from small_vocabulary import EOS, grammar_of, ids_of, loaded, schemas, small_vocabulary, text_of
from structured_requests import PERSON, constrained, ended, regex
from tiny_models import (
    CONTEXT,
    FINGERPRINT,
    VOCAB,
    all_tokens,
    collect,
    prompts_of,
    request_for,
    tiny_model,
    tokens_of,
    until,
)

from serve_app.config import EngineConfig
from serve_app.core import Failure, FailureCode, FinishReason, GenerationRequest, Reply, SamplingParams, TokenBatch
from serve_app.engine import engine as engine_module
from serve_app.engine import grammars
from serve_app.engine.cpu.library import Kernels
from serve_app.engine.engine import Engine
from serve_app.grammar import Vocabulary, VocabularyError, compile_grammar

MakeEngine = Callable[..., Engine]


@pytest.fixture(scope="module")
def engines(kernels: Kernels, kernel_folder: Path) -> Iterator[dict[str, Engine]]:
    """By tensor operations; by kernels, with prompt lookup; the same with few pages, in fine chunks."""
    found: dict[str, Engine] = {}
    for name in ("tensors", "kernels", "cramped"):
        model = tiny_model("llama")
        memory: str | int = "16MiB"
        if name == "cramped":
            layers = found["kernels"]._core.runner.layers.values()
            memory = 10 * 16 * sum(layer.shape.bytes_per_token for layer in layers)
        config = EngineConfig(
            kv_cache_memory=memory,  # type: ignore[arg-type]
            threads=1,
            max_running=8,
            max_step_tokens=13 if name == "cramped" else 512,
            prompt_lookup=name != "tensors",
            cpu_kernels=name != "tensors",
        )
        found[name] = Engine(
            model,
            config,
            context_tokens=150,
            fingerprint=FINGERPRINT,
            kernel_cache=None if name == "tensors" else kernel_folder,
            vocabulary=loaded(),
        )
    yield found
    for engine in found.values():
        engine.stop()
        assert engine.stats().used_pages == 0, "pages leaked"
        assert engine.stats().counters.accepted_tokens > 0, "nothing was drafted"
    assert found["cramped"].stats().preemptions > 0


sampling = st.builds(
    SamplingParams,
    seed=st.integers(0, 2**64 - 1),
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    top_p=st.sampled_from([1.0, 0.8]),
    top_k=st.sampled_from([0, 3]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    presence_penalty=st.sampled_from([0.0, 0.7]),
    logit_bias=st.sampled_from([(), ((EOS, 50.0),), ((EOS, -50.0),)]),
    min_tokens=st.sampled_from([0, 0, 9, 50]),
    logprobs=st.sampled_from([None, 1]),
)
requests = st.builds(
    lambda schema, params, prompt, new, stops, choice: (
        schema,
        constrained(grammar_of(schema), new, sampling=params, prompt=prompt, stop_token_ids=stops, choice=choice),
    ),
    schemas,
    sampling,
    st.sampled_from(prompts_of((1, 17, 40))),
    st.sampled_from([50, 50, 90]),
    st.sampled_from([(EOS,), (EOS, 17), ()]),
    st.integers(0, 2),
)


LONG = {"type": "string", "minLength": 60, "maxLength": 90}
CROWD = [
    (LONG, constrained(grammar_of(LONG), 80, seed, prompt=prompt)) for seed, prompt in enumerate(prompts_of([50] * 6))
]
"""More than the cramped cache holds at a time."""


@settings(max_examples=cases(10, exploring=100))
@example(asked=CROWD, place=0)
@given(asked=st.lists(requests, min_size=1, max_size=7), place=st.integers(0, 6))
def test_outputs_validate_and_are_the_same_however_they_are_made(
    engines: dict[str, Engine], asked: list[tuple[dict[str, Any], GenerationRequest]], place: int
) -> None:
    only = [request for _, request in asked]

    async def together(engine: Engine) -> list[Any]:
        free = [request_for([9] * 20, 30), request_for([3, 4] * 9, 40, sampling=SamplingParams(seed=3))]
        replies = await asyncio.gather(*(collect(engine, request) for request in [*only, *free]))
        return [ended(each) for each in replies]

    async def compare() -> None:
        expected = [ended(await collect(engines["kernels"], request)) for request in only]
        for (schema, _), (ids, reason) in zip(asked, expected, strict=True):
            if reason is FinishReason.STOP:
                jsonschema.validate(json.loads(text_of([token_id for token_id in ids if token_id != EOS])), schema)
        for name in ("kernels", "cramped"):
            assert (await together(engines[name]))[: len(only)] == expected, f"in a crowd, {name}"
        alone = [ended(await collect(engines["tensors"], request)) for request in only]
        assert alone == (await together(engines["tensors"]))[: len(only)], "by tensors"
        ids, reason = expected[place % len(only)]
        for known in range(1 + len(ids)):
            continued = replace(only[place % len(only)], output_token_ids=tuple(ids[:known]))
            assert ended(await collect(engines["kernels"], continued)) == (ids[known:], reason), known

    asyncio.run(compare())


async def test_the_end_waits_for_the_grammar_and_comes_when_it_allows_it(make_engine: MakeEngine) -> None:
    engine = make_engine(vocabulary=loaded())
    eager = SamplingParams(seed=1, temperature=0, logit_bias=((EOS, 1000.0),))
    ids, reason = ended(await collect(engine, constrained(regex("na(me)+"), sampling=eager)))
    assert (text_of(ids[:-1]), ids[-1], reason) == ("name", EOS, FinishReason.STOP)
    later = replace(eager, min_tokens=9)
    ids, reason = ended(await collect(engine, constrained(regex("na(me)+"), sampling=later)))
    assert (ids[-1], reason) == (EOS, FinishReason.STOP)
    assert len(ids) > 9


@pytest.mark.parametrize("fields", [{}, {"stop_token_ids": ()}, {"sampling": SamplingParams(seed=1, min_tokens=30)}])
async def test_an_output_that_nothing_can_follow_ends_even_if_its_end_is_ignored(
    fields: dict[str, Any], make_engine: MakeEngine
) -> None:
    engine = make_engine(vocabulary=loaded())
    request = constrained(regex("(true|false),null"), **fields)
    ids, reason = ended(await collect(engine, request))
    assert text_of(ids) in ("true,null", "false,null")
    assert reason is FinishReason.STOP
    steps = engine.stats().counters.steps
    complete = replace(request, output_token_ids=tuple(ids))
    assert await collect(engine, complete) == [TokenBatch(len(ids), finish_reason=FinishReason.STOP)]
    at_the_limit = replace(complete, max_new_tokens=len(ids))
    assert await collect(engine, at_the_limit) == [TokenBatch(len(ids), finish_reason=FinishReason.STOP)]
    assert engine.stats().counters.steps == steps, "nothing is computed for it"


async def test_an_output_may_be_empty(make_engine: MakeEngine) -> None:
    engine = make_engine(vocabulary=loaded())
    assert ended(await collect(engine, constrained('start: ""'))) == ([EOS], FinishReason.STOP)
    [batch] = await collect(engine, constrained('start: ""', stop_token_ids=()))
    assert isinstance(batch, TokenBatch)
    assert (batch.token_ids, batch.finish_reason) == ((), FinishReason.STOP)
    assert batch.stats is not None


@pytest.mark.parametrize(
    ("grammar", "fields", "text"),
    [(regex("naé|naè"), {}, "na"), (regex("nax1|nax2"), {"stop_token_ids": (EOS, *ids_of("x"))}, "na")],
)
async def test_an_output_that_cannot_go_on_is_a_failure_of_its_own(
    grammar: str, fields: dict[str, Any], text: str, make_engine: MakeEngine
) -> None:
    engine = make_engine(vocabulary=loaded())
    free = asyncio.create_task(tokens_of(engine, request_for([9], 40)))
    *batches, failure = await collect(engine, constrained(grammar, **fields))
    assert text_of([token_id for batch in batches for token_id in batch.token_ids]) == text  # type: ignore[union-attr]
    assert isinstance(failure, Failure)
    assert failure.code is FailureCode.INVALID_REQUEST
    assert "no token that the grammar allows may come next" in failure.message
    assert len(await free) == 40


async def test_what_a_grammar_forces_costs_no_step_of_its_own(make_engine: MakeEngine) -> None:
    grammar = grammar_of({"const": {"name": "a long and certain text", "null": [True, False]}})
    for lookup in (False, True):
        engine = make_engine(vocabulary=loaded(), prompt_lookup=lookup, max_running=16)
        ids, reason = ended(await collect(engine, constrained(grammar)))
        assert json.loads(text_of(ids)) == {"name": "a long and certain text", "null": [True, False]}
        assert reason is FinishReason.STOP
        assert engine.stats().counters.accepted_tokens >= len(ids) // 2
        assert engine.stats().counters.steps < len(ids) // 2


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ("start: ((", "the grammar can't be used: "),
        (grammar_of({"type": "nothing"}), "the grammar can't be used: Invalid type"),
        (regex("é"), "no token that the grammar allows may come next"),
        ("x" * 2**19, "longer than"),
    ],
)
async def test_a_grammar_that_cannot_be_used_is_refused_with_the_reason(
    grammar: str, message: str, make_engine: MakeEngine
) -> None:
    engine = make_engine(vocabulary=loaded())
    for _ in range(2):
        [failure] = await collect(engine, constrained(grammar))
        assert isinstance(failure, Failure)
        assert failure.code is FailureCode.INVALID_REQUEST
        assert message in failure.message
    assert engine.stats().counters.steps == 0


async def test_an_output_that_breaks_the_grammar_is_not_continued(make_engine: MakeEngine) -> None:
    engine = make_engine(vocabulary=loaded())
    request = constrained(regex("[a-z]+[0-9]"), output_token_ids=tuple(ids_of("abc") + ids_of("!")))
    [failure] = await collect(engine, request)
    assert failure == Failure(FailureCode.INVALID_REQUEST, "the output so far does not match the grammar")


async def test_without_a_vocabulary_grammars_are_refused_and_nothing_else_is(make_engine: MakeEngine) -> None:
    broken: Future[Vocabulary] = Future()
    broken.set_exception(VocabularyError("this model's tokenizer can't be used with a grammar: it is a song"))
    for vocabulary, message in ((None, "has no vocabulary"), (broken, "it is a song")):
        engine = make_engine(vocabulary=vocabulary)
        [failure] = await collect(engine, constrained(regex("a")))
        assert isinstance(failure, Failure)
        assert (failure.code, message in failure.message) == (FailureCode.INVALID_REQUEST, True)
        assert len(await tokens_of(engine, request_for([1], 5))) == 5


async def test_a_request_waits_for_a_vocabulary_that_is_loading_and_says_that_it_lives(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "HEARTBEAT_S", 0.01)
    vocabulary: Future[Vocabulary] = Future()
    request = constrained(regex("abc"), output_token_ids=tuple(ids_of("a")))
    replies = make_engine(vocabulary=vocabulary).generate(request)
    assert await anext(replies) == TokenBatch(1)
    assert await anext(replies) == TokenBatch(1)
    vocabulary.set_result(small_vocabulary())
    rest: list[Reply] = [reply async for reply in replies]
    assert text_of([token_id for reply in rest for token_id in reply.token_ids]) == "bc"  # type: ignore[union-attr]


async def test_nobody_waits_for_a_grammar_of_another_and_who_leaves_takes_it_from_nobody(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow(vocabulary: Vocabulary, grammar: str) -> LLMatcher:
        if "abc" in grammar:
            begun.set()
            assert go_on.wait(20)
        return compile_grammar(vocabulary, grammar)

    monkeypatch.setattr(grammars, "compile_grammar", slow)
    engine = make_engine(vocabulary=loaded())
    leaves = asyncio.create_task(collect(engine, constrained(regex("abc"))))
    stays = asyncio.create_task(collect(engine, constrained(regex("abc"))))
    await until(begun.is_set)
    assert len(await tokens_of(engine, request_for([1], 30))) == 30
    assert ended(await collect(engine, constrained(regex("name"))))[1] is FinishReason.STOP
    leaves.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaves
    go_on.set()
    assert text_of(ended(await stays)[0]) == "abc"


async def test_grammars_are_compiled_once_and_few_are_kept(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []

    def counting(vocabulary: Vocabulary, grammar: str) -> LLMatcher:
        compiled.append(grammar)
        return compile_grammar(vocabulary, grammar)

    monkeypatch.setattr(grammars, "compile_grammar", counting)
    monkeypatch.setattr(grammars, "KEPT_GRAMMARS", 2)
    engine = make_engine(vocabulary=loaded())
    a, b, c = (constrained(regex(letter)) for letter in "abc")
    for request in (a, a, b, a, c, a, b):
        await collect(engine, request)
    assert compiled == [a.constraint, b.constraint, c.constraint, b.constraint]
    compiled.clear()
    monkeypatch.setattr(grammars, "KEPT_BYTES", 2 * len(a.constraint) - 1)
    for request in (c, b, a, a, b):
        await collect(engine, request)
    assert compiled == [c.constraint, b.constraint, a.constraint, b.constraint]


async def test_a_model_of_fixed_shapes_keeps_to_grammars_too(make_engine: MakeEngine) -> None:
    engine = make_engine("gemma2", vocabulary=loaded(), batch_invariant=True, max_step_tokens=24, max_running=4)
    asked = [constrained(grammar_of(PERSON), seed=seed, new_tokens=90) for seed in range(3)]
    *outputs, free = await all_tokens(engine, [*asked, request_for([9] * 30, 30)])
    assert len(free) == 30
    for ids in outputs:
        jsonschema.validate(json.loads(text_of([token_id for token_id in ids if token_id != EOS])), PERSON)


async def test_logprobs_and_a_prompts_logprobs_come_with_a_grammar(make_engine: MakeEngine) -> None:
    engine = make_engine(vocabulary=loaded())
    params = SamplingParams(seed=4, logprobs=2)
    replies = await collect(engine, constrained(grammar_of(PERSON), 90, sampling=params, prompt_logprobs=1))
    ids, _ = ended(replies)
    told = [one for reply in replies for one in reply.logprobs or ()]  # type: ignore[union-attr]
    assert len(told) == len(ids)
    assert any(one.logprob < one.top[-1][1] for one in told), "the grammar's tokens are not the model's favourites"
    assert replies[0].prompt_logprobs is not None  # type: ignore[union-attr]
    [batch] = await collect(engine, constrained('start: ""', stop_token_ids=(), prompt_logprobs=1))
    assert batch.prompt_logprobs is not None  # type: ignore[union-attr]


assert CONTEXT > 150
assert VOCAB == 128
