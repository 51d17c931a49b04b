"""Guessing ahead changes when tokens come, and nothing else: not one of them, not a bit of a logprob, no page."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from exploring import cases
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from tiny_models import (
    VOCAB,
    all_tokens,
    collect,
    greedy_reference,
    prompts_of,
    request_for,
    tiny_model,
    tokens_of,
    until,
)

from serve_app.config import EngineConfig
from serve_app.core import (
    Failure,
    FailureCode,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    TokenBatch,
    TokenLogprobs,
)
from serve_app.engine.attention.base import AttentionParams, Span
from serve_app.engine.attention.sdpa import SdpaAttention
from serve_app.engine.cpu.library import Kernels
from serve_app.engine.engine import Engine
from serve_app.engine.prompt_lookup import ROW_COST

MakeEngine = Callable[..., Engine]
KINDS = ("mistral", "gemma2", "gpt2")
"""A window; a window, a softcap and large vocabulary logits; learned positions and biases."""
FEW = tuple((token_id, 9.0) for token_id in (3, 14, 15, 92))
"""A bias under which a random model babbles in four ids, so that it repeats itself."""
NO_LOOKUP = {"prompt_lookup": False}


@pytest.mark.parametrize("kind", KINDS)
async def test_greedy_is_generate_token_for_token(kind: str, make_engine: MakeEngine) -> None:
    prompts = [[5, 6, 7, 8] * 4, [9] * 7, *prompts_of((1, 2, 30))]
    expected = [greedy_reference(kind, prompt, 40) for prompt in prompts]
    engine = make_engine(kind, max_step_tokens=48, max_running=16)
    requests = [request_for(prompt, 40) for prompt in prompts]
    assert [await tokens_of(engine, request) for request in requests] == expected, "alone"
    assert await all_tokens(engine, requests) == expected, "together"


Made = tuple[list[tuple[int, TokenLogprobs | None]], FinishReason | None]


async def made(engine: Engine, request: GenerationRequest) -> Made:
    """Each token that the attempt made, with its logprobs, and how it ended; indices must be gapless."""
    tokens: list[tuple[int, TokenLogprobs | None]] = []
    reply: Any = None
    async for reply in engine.generate(request):
        assert isinstance(reply, TokenBatch), reply
        assert reply.first_index == len(request.output_token_ids) + len(tokens)
        assert (reply.logprobs is None) == (request.sampling.logprobs is None or not reply.token_ids)
        tokens.extend(zip(reply.token_ids, reply.logprobs or [None] * len(reply.token_ids), strict=True))
    return tokens, reply.finish_reason


@pytest.fixture(scope="module", autouse=True)
def row_cost() -> Iterator[None]:
    """Not the measured one: on a busy machine it may say that no guess is worth its row."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("serve_app.engine.build.measure_row_cost", lambda _: ROW_COST)
        yield


@pytest.fixture(scope="module", params=KINDS)
def engines(request: pytest.FixtureRequest, kernels: Kernels, kernel_folder: Path) -> Iterator[list[Engine]]:
    """Without guesses; with them and all the room it wants; with them, preempting and in fine chunks."""
    found: list[Engine] = []
    memory: str | int = "16MiB"
    for lookup, step in ((False, 512), (True, 512), (True, 13)):
        if step == 13:
            layers = found[0]._core.runner.layers.values()
            memory = 9 * 16 * sum(layer.shape.bytes_per_token for layer in layers)
        config = EngineConfig(
            kv_cache_memory=memory,  # type: ignore[arg-type]
            threads=1,
            max_step_tokens=step,
            max_running=12,
            prompt_lookup=lookup,
        )
        model = tiny_model(request.param)
        fingerprint = request_for([1]).fingerprint
        found.append(Engine(model, config, context_tokens=200, fingerprint=fingerprint, kernel_cache=kernel_folder))
        assert found[-1].capacity.batch_invariant
    yield found
    for engine in found:
        engine.stop()
        assert engine.stats().used_pages == 0, "pages leaked"
    without, *others = (engine.stats().counters for engine in found)
    assert without.drafted_tokens == without.accepted_tokens == 0
    for counters in others:
        assert 0 < counters.accepted_tokens < counters.drafted_tokens, "nothing was tested"
    assert found[2].stats().preemptions > 0
    assert others[0].cached_prompt_tokens > 0


ids = st.integers(0, VOCAB - 1)
sampling = st.builds(
    SamplingParams,
    seed=st.integers(0, 2**64 - 1),
    temperature=st.sampled_from([0.0, 0.4, 1.0]),
    top_p=st.sampled_from([1.0, 0.8]),
    top_k=st.sampled_from([0, 3]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.2]),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.7]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.3]),
    logit_bias=st.sampled_from([(), FEW, FEW]),
    min_tokens=st.sampled_from([0, 0, 5, 25]),
    logprobs=st.sampled_from([None, 0, 2]),
)
requests = st.builds(
    lambda pattern, times, tail, new, params, stop, choice, salt: request_for(
        (pattern * times + tail)[-60:],
        new,
        sampling=params,
        stop_token_ids=stop,
        choice=choice,
        cache_salt=salt,
    ),
    st.lists(ids, min_size=1, max_size=6),
    st.integers(1, 12),
    st.lists(ids, max_size=8),
    st.integers(1, 40),
    sampling,
    st.sampled_from([(), (), (3,), (92, 15)]),
    st.integers(0, 2),
    st.sampled_from(["", "other"]),
)


CROWD = [
    request_for(prompt, 40, sampling=SamplingParams(seed=seed, logit_bias=FEW))
    for seed, prompt in enumerate(prompts_of([50] * 6))
]
"""More than the cramped cache holds at a time, and each repeats itself: what the fixture counts does happen."""


@settings(max_examples=cases(10, exploring=125), deadline=None)
@example(asked=CROWD, cut=20)
@given(asked=st.lists(requests, min_size=2, max_size=8), cut=st.integers(1, 30))
def test_the_same_bits_with_guesses_and_without(
    engines: list[Engine], asked: list[GenerationRequest], cut: int
) -> None:
    without, roomy, cramped = engines

    async def compare() -> None:
        expected = [await made(without, request) for request in asked]
        assert [await made(roomy, request) for request in asked] == expected, "alone"
        assert list(await asyncio.gather(*(made(cramped, request) for request in asked))) == expected, "in a crowd"
        tokens, reason = expected[0]
        if cut < len(tokens):
            delivered = tuple(token_id for token_id, _ in tokens[:cut])
            continued = replace(asked[0], output_token_ids=delivered)
            assert await made(roomy, continued) == (tokens[cut:], reason), "continued"

    asyncio.run(compare())


async def test_guesses_save_steps_and_are_counted(make_engine: MakeEngine) -> None:
    request = request_for([1, 2, 3], 60, sampling=SamplingParams(seed=1, temperature=0, logit_bias=((9, 50.0),)))
    plain, guessing = make_engine(**NO_LOOKUP), make_engine()
    assert await tokens_of(plain, request) == await tokens_of(guessing, request) == [9] * 60
    await until(lambda: plain.stats().counters.steps == 60)
    # Each step gives a token, and each right guess one more; the last step is counted behind its tokens' delivery.
    await until(lambda: guessing.stats().counters.accepted_tokens == 60 - guessing.stats().counters.steps)
    assert guessing.stats().counters.steps < 20
    assert guessing.stats().counters.output_tokens == 60


async def test_a_batch_may_hold_several_tokens_and_their_logprobs(make_engine: MakeEngine) -> None:
    params = SamplingParams(seed=1, temperature=0, logit_bias=((9, 50.0),), logprobs=1)
    batches = await collect(make_engine(), request_for([1, 2, 3], 40, sampling=params))
    assert any(len(batch.token_ids) > 1 for batch in batches)  # type: ignore[union-attr]
    for batch in batches:
        assert isinstance(batch, TokenBatch)
        assert len(batch.logprobs or ()) == len(batch.token_ids)
    assert [batch.finish_reason for batch in batches] == [None] * (len(batches) - 1) + [FinishReason.LENGTH]  # type: ignore[union-attr]


async def test_a_stop_within_what_was_guessed_right_ends_there(make_engine: MakeEngine) -> None:
    """The stop id comes first when `min_tokens` lets it: guesses never hold it, and nothing comes behind it."""
    params = SamplingParams(seed=1, temperature=0, logit_bias=((9, 50.0), (8, 60.0)), min_tokens=33)
    request = request_for([1, 2, 3], 60, sampling=params, stop_token_ids=(8,))
    engine = make_engine()
    assert await tokens_of(engine, request) == [9] * 33 + [8]
    assert engine.stats().counters.accepted_tokens > 10


async def test_a_suspect_is_not_guessed_for_until_it_has_company(make_engine: MakeEngine) -> None:
    told: list[GenerationRequest] = []
    engine = make_engine(before_isolated=told.append)
    suspect = request_for([5, 6] * 10, 20, isolated=True)
    assert await tokens_of(engine, suspect) == await tokens_of(make_engine(**NO_LOOKUP), suspect)
    assert len(told) == 1


class NotANumber(SdpaAttention):
    """Gives NaN from the 60th token on, and for all rows of the sequence that are computed beside it."""

    name = "not-a-number"
    guesses_only = False

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, params: AttentionParams, step: list[Span]
    ) -> torch.Tensor:
        output = super().attend(query, keys, values, params, step)
        for span in step:
            if 60 <= span.kv_len <= 100 and (span.query_len > 1 or not self.guesses_only):
                output[span.query_start : span.query_start + span.query_len] = float("nan")
        return output


class NotANumberInGuesses(NotANumber):
    """The same, but only where several rows of a sequence are computed."""

    guesses_only = True


async def test_a_guess_that_spoils_a_step_harms_nobody(make_engine: MakeEngine) -> None:
    params = SamplingParams(seed=1, temperature=0, logit_bias=((9, 50.0),))
    engine = make_engine(backends=(NotANumberInGuesses,))
    both = await all_tokens(engine, [request_for([9] * 30, 50, sampling=params), request_for([9] * 3, 20)])
    assert both[0] == [9] * 50
    assert engine.stats().counters.accepted_tokens > 5
    for lookup in (False, True):
        engine = make_engine(backends=(NotANumber,), prompt_lookup=lookup)
        *batches, failure = await collect(engine, request_for([9] * 30, 50, sampling=params))
        assert [t for batch in batches for t in batch.token_ids] == [9] * 30, "all that was right before"  # type: ignore[union-attr]
        assert isinstance(failure, Failure)
        assert failure.code is FailureCode.ENGINE_FAILED


async def test_steps_of_a_fixed_shape_take_guesses_too(make_engine: MakeEngine) -> None:
    settings_ = {"batch_invariant": True, "max_step_tokens": 24, "max_running": 4}
    prompts = [[5, 6, 7] * 5, [9] * 6]
    expected = [greedy_reference("gemma2", prompt, 40) for prompt in prompts]
    engine = make_engine("gemma2", **settings_)
    assert await all_tokens(engine, [request_for(prompt, 40) for prompt in prompts]) == expected
    assert engine.stats().counters.accepted_tokens > 0


async def test_a_prediction_changes_no_token_and_saves_steps(
    make_engine: MakeEngine, kernel_folder: Path, kernels: Kernels
) -> None:
    engine = make_engine(kernel_cache=kernel_folder)
    (prompt,) = prompts_of((30,))
    for sampling in (SamplingParams(seed=0, temperature=0), SamplingParams(seed=5, logprobs=1)):
        request = request_for(prompt, 60, sampling=sampling)
        plain = await made(engine, request)
        tokens = [token_id for token_id, _ in plain[0]]
        changed = tuple((token_id + 1) % VOCAB if place == 20 else token_id for place, token_id in enumerate(tokens))
        for predicted, most in ((tuple(tokens), 30), (changed, 40), (tuple(range(60)), 62)):
            before = engine.stats().counters
            assert await made(engine, replace(request, predicted_token_ids=predicted)) == plain
            after = engine.stats().counters
            assert after.steps - before.steps <= most, (sampling, predicted == tuple(tokens))
    half = replace(request, predicted_token_ids=tuple(tokens), output_token_ids=tuple(tokens[:25]))
    assert await made(engine, half) == (plain[0][25:], plain[1]), "continued elsewhere"
