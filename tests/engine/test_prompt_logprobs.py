"""Logprobs of prompts: the model's own, and the same bits alone, in company, in chunks and after a failover."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from exploring import cases
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from tiny_models import VOCAB, collect, prompts_of, request_for, tiny_model, tokens_of

from serve_app.core import (
    Failure,
    FailureCode,
    FinishReason,
    GenerationRequest,
    PromptLogprobs,
    SamplingParams,
    TokenBatch,
    decode_replies,
    encode_replies,
)
from serve_app.engine.engine import Engine
from serve_app.engine.prompt_logprobs import PromptScores

MakeEngine = Callable[..., Engine]


async def scores_of(engine: Engine, request: GenerationRequest) -> PromptLogprobs:
    """The prompt's logprobs, which must come once and with the first tokens."""
    replies = [reply for reply in await collect(engine, request) if reply != TokenBatch(0)]
    assert all(isinstance(reply, TokenBatch) for reply in replies), replies
    first, *rest = replies
    assert isinstance(first, TokenBatch)
    assert first.prompt_logprobs is not None
    assert all(isinstance(reply, TokenBatch) and reply.prompt_logprobs is None for reply in rest)
    return first.prompt_logprobs


async def test_they_are_the_models_own(make_engine: MakeEngine) -> None:
    (prompt,) = prompts_of([61])
    model = tiny_model("llama")
    expected = model(torch.tensor([prompt])).logits[0].detach().log_softmax(-1)
    scores = await scores_of(make_engine(max_running=7), request_for(prompt, 3, prompt_logprobs=4))
    assert len(scores) == 60
    for place, (told, rank) in enumerate(scores.tokens()):
        row, token_id = expected[place], prompt[place + 1]
        assert told.logprob == pytest.approx(row[token_id].item(), abs=2e-3)
        values = torch.tensor([value for _, value in told.top])
        assert torch.allclose(values, row.topk(4).values, atol=2e-3)
        assert values.tolist() == sorted(values.tolist(), reverse=True)
        assert sum(row > row[token_id] + 2e-3) < rank <= 1 + sum(row > row[token_id] - 2e-3)
        assert (rank == 1) == (told.top[0][0] == token_id)


async def test_the_same_bits_alone_in_a_batch_in_chunks_and_beside_decodes(
    make_engine: MakeEngine, kernel_folder: Path, kernels: object
) -> None:
    requests = [request_for(p, 6, prompt_logprobs=3) for p in prompts_of((2, 5, 33, 64, 80, 17))]
    engine = make_engine(max_running=16, max_step_tokens=48, kernel_cache=kernel_folder)
    assert engine.capacity.batch_invariant
    alone = [await scores_of(engine, each) for each in requests]
    company = [tokens_of(engine, request_for(p, 40)) for p in prompts_of((3, 30, 9), seed=5)]
    together, *_ = await asyncio.gather(asyncio.gather(*(scores_of(engine, each) for each in requests)), *company)
    assert list(together) == alone
    other_replica = make_engine(max_running=3, max_step_tokens=5, kernel_cache=kernel_folder)
    assert [await scores_of(other_replica, each) for each in requests] == alone


async def test_cached_pages_are_not_used_for_them_and_are_published(make_engine: MakeEngine) -> None:
    engine = make_engine(max_running=8)
    (prompt,) = prompts_of([64])
    first = await scores_of(engine, request_for(prompt, 2, prompt_logprobs=1))
    assert await scores_of(engine, request_for(prompt, 2, prompt_logprobs=1)) == first
    assert engine.stats().counters.cached_prompt_tokens == 0
    await tokens_of(engine, request_for(prompt, 2))
    assert engine.stats().counters.cached_prompt_tokens == 48


async def test_preemption_computes_no_score_twice(make_engine: MakeEngine) -> None:
    prompts = prompts_of((60, 61, 63, 67), seed=3)
    page_bytes = 16 * sum(layer.shape.bytes_per_token for layer in make_engine()._core.runner.layers.values())
    engine = make_engine(kv_cache_memory=13 * page_bytes, context=180, max_running=4, prompt_lookup=False)
    requests = [request_for(prompt, 90, prompt_logprobs=2) for prompt in prompts]
    alone = [await scores_of(engine, replace(each, max_new_tokens=0)) for each in requests]
    together = await asyncio.gather(*(scores_of(engine, each) for each in requests))
    assert engine.stats().preemptions > 0, "the cache was large enough after all: the test tests nothing"
    for one, other in zip(alone, together, strict=True):
        assert len(one) == len(other)
        for (told, _), (again, _) in zip(one.tokens(), other.tokens(), strict=True):
            assert told.logprob == pytest.approx(again.logprob, abs=2e-3)


async def test_no_token_may_be_wanted(make_engine: MakeEngine) -> None:
    engine = make_engine(context=64)
    for length in (1, 2, 64):  # 64 is the whole context
        (prompt,) = prompts_of([length])
        (batch,) = await collect(engine, request_for(prompt, 0, prompt_logprobs=0))
        assert isinstance(batch, TokenBatch)
        assert (batch.token_ids, batch.finish_reason) == ((), FinishReason.LENGTH)
        assert batch.prompt_logprobs is not None
        assert len(batch.prompt_logprobs) == length - 1
        assert batch.stats is not None
    assert await collect(engine, request_for([1], 0)) == [TokenBatch(0, finish_reason=FinishReason.LENGTH)]
    assert engine.stats().counters.output_tokens == 0


async def test_an_attempt_that_continues_does_not_compute_them(make_engine: MakeEngine) -> None:
    engine = make_engine()
    (prompt,) = prompts_of([40])
    whole = await tokens_of(engine, request_for(prompt, 8))
    request = request_for(prompt, 8, prompt_logprobs=1, output_token_ids=tuple(whole[:3]))
    replies = await collect(engine, request)
    assert all(isinstance(reply, TokenBatch) and reply.prompt_logprobs is None for reply in replies)
    assert whole[3:] == [token for reply in replies for token in reply.token_ids]  # type: ignore[union-attr]


@pytest.mark.parametrize("wrong", [{"prompt_logprobs": VOCAB + 1}, {"prompt_logprobs": -1}, {"max_new_tokens": -1}])
async def test_what_can_not_be_served_is_refused(make_engine: MakeEngine, wrong: dict[str, int]) -> None:
    (failure,) = await collect(make_engine(), replace(request_for([1, 2], 2), **wrong))
    assert isinstance(failure, Failure)
    assert failure.code is FailureCode.INVALID_REQUEST


async def test_a_model_that_gives_no_numbers_fails_the_request(make_engine: MakeEngine) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[9] = float("nan")
    engine = make_engine(model=model)
    (failure,) = await collect(engine, request_for([1, 9, 3], 0, prompt_logprobs=1))
    assert isinstance(failure, Failure)
    assert failure.code is FailureCode.ENGINE_FAILED
    assert len(await scores_of(engine, request_for([1, 2, 3], 0, prompt_logprobs=1))) == 2


@settings(deadline=None, max_examples=cases(10, exploring=150))
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.sampled_from((0, 1, 5)), st.sampled_from((129, 1000)))
def test_how_the_rows_are_divided_changes_no_bit(chunks: list[int], top: int, vocab: int) -> None:
    generator = torch.Generator().manual_seed(len(chunks))
    logits = torch.randn(sum(chunks), vocab, generator=generator) * 8
    ids = torch.randint(0, vocab, (len(logits) + 1,), generator=generator).tolist()
    whole, divided = PromptScores(top), PromptScores(top)
    whole.add(logits, ids)
    for piece in logits.split(chunks):
        divided.add(piece.clone(), ids)
    assert divided.packed() == whole.packed()
    expected = logits.double().log_softmax(-1)
    for place, (told, rank) in enumerate(whole.packed().tokens()):
        assert told.logprob == pytest.approx(expected[place, ids[place + 1]].item(), abs=1e-4)
        assert rank == 1 + (logits[place] > logits[place, ids[place + 1]]).sum()


def test_they_pass_between_processes_bit_for_bit() -> None:
    scores = PromptScores(2)
    scores.add(torch.randn(5, 64), [1, 2, 3, 4, 5, 6])
    batch = TokenBatch(0, (1,), prompt_logprobs=scores.packed())
    assert decode_replies(encode_replies([(3, batch)])) == [(3, batch)]


async def test_they_do_not_change_the_answer(make_engine: MakeEngine, kernel_folder: Path, kernels: object) -> None:
    engine = make_engine(kernel_cache=kernel_folder)
    (prompt,) = prompts_of([50])
    request = request_for(prompt, 12, sampling=SamplingParams(seed=3, logprobs=1))
    assert await tokens_of(engine, replace(request, prompt_logprobs=1)) == await tokens_of(engine, request)
