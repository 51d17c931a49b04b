"""The engine as its callers see it: the model's own tokens, alone and in company, through every disturbance."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from tiny_models import (
    ARCHITECTURES,
    CONTEXT,
    MIXTURES,
    SIZES,
    VOCAB,
    all_tokens,
    collect,
    greedy_reference,
    prompts_of,
    request_for,
    tokens_of,
    until,
)
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    LlamaConfig,
    MambaConfig,
    MambaForCausalLM,
    PhimoeConfig,
    Qwen2MoeConfig,
)

from serve_app.core import (
    Failure,
    FailureCode,
    Fingerprint,
    FinishReason,
    GenerationRequest,
    Priority,
    SamplingParams,
    TokenBatch,
)
from serve_app.engine.attention.base import AttentionParams, Span
from serve_app.engine.attention.plain import PlainAttention
from serve_app.engine.attention.sdpa import SdpaAttention
from serve_app.engine.engine import Engine
from serve_app.engine.engine_error import EngineError, UnsupportedModelError

MakeEngine = Callable[..., Engine]
LENGTHS = (1, 2, 3, 5, 8, 13, 16, 17, 21, 30, 31, 33, 47, 64, 80, 100)


@pytest.mark.parametrize("kind", [*ARCHITECTURES, *MIXTURES])
async def test_greedy_is_generate_token_for_token(kind: str, make_engine: MakeEngine) -> None:
    prompts = prompts_of(LENGTHS)
    expected = [greedy_reference(kind, prompt, 20) for prompt in prompts]
    engine = make_engine(kind, max_step_tokens=48, max_running=16)
    requests = [request_for(prompt) for prompt in prompts]
    assert [await tokens_of(engine, request) for request in requests[::5]] == expected[::5], "alone"
    assert await all_tokens(engine, requests) == expected, "in a mixed batch of 16, prefilled in chunks"


@pytest.mark.parametrize("kind", ARCHITECTURES)
async def test_greedy_survives_preemption(kind: str, make_engine: MakeEngine) -> None:
    prompts = prompts_of((30, 31, 33, 47, 20, 25), seed=3)
    expected = [greedy_reference(kind, prompt, 40) for prompt in prompts]
    page_bytes = 16 * sum(layer.shape.bytes_per_token for layer in make_engine(kind)._core.runner.layers.values())
    # Without guesses, by which some would be done before the pages run out (test_drafts has both).
    engine = make_engine(kind, kv_cache_memory=13 * page_bytes, context=200, max_step_tokens=32, prompt_lookup=False)
    assert await all_tokens(engine, [request_for(prompt, 40) for prompt in prompts]) == expected
    assert engine.stats().preemptions > 0, "the cache was large enough after all: the test tests nothing"


async def test_batch_work_that_yields_gives_the_same_tokens(make_engine: MakeEngine) -> None:
    prompts = prompts_of((30, 31, 33, 20, 25), seed=4)
    expected = [greedy_reference("llama", prompt, 40) for prompt in prompts]
    engine = make_engine(max_running=3, max_step_tokens=32)
    low = [asyncio.create_task(tokens_of(engine, request_for(p, 40, priority=Priority.BATCH))) for p in prompts[:3]]
    await until(lambda: engine.stats().counters.output_tokens >= 6)
    assert await all_tokens(engine, [request_for(prompt, 40) for prompt in prompts[3:]]) == expected[3:]
    assert await asyncio.gather(*low) == expected[:3]
    assert engine.stats().preemptions >= 2


async def test_a_tenant_that_makes_way_for_another_gets_the_same_tokens(make_engine: MakeEngine) -> None:
    prompts = prompts_of((30, 31, 33, 20, 25), seed=4)
    expected = [greedy_reference("llama", prompt, 40) for prompt in prompts]
    engine = make_engine(max_running=3, max_step_tokens=32)
    greedy = [asyncio.create_task(tokens_of(engine, request_for(p, 40, tenant="greedy"))) for p in prompts[:3]]
    await until(lambda: engine.stats().counters.output_tokens >= 6)
    assert await all_tokens(engine, [request_for(p, 40, tenant="modest") for p in prompts[3:]]) == expected[3:]
    assert await asyncio.gather(*greedy) == expected[:3]
    assert engine.stats().preemptions >= 1


async def test_a_seed_gives_the_same_tokens_alone_in_a_batch_and_continued(make_engine: MakeEngine) -> None:
    prompts = prompts_of(LENGTHS, seed=1)
    requests = [
        request_for(
            prompt,
            30,
            sampling=SamplingParams(
                seed=100 + i,
                temperature=0.8 + 0.05 * i,
                top_p=0.9 if i % 3 == 0 else 1.0,
                top_k=20 if i % 4 == 1 else 0,
                frequency_penalty=0.4 if i % 5 == 2 else 0.0,
                repetition_penalty=1.2 if i % 7 == 3 else 1.0,
            ),
            choice=i % 3,
        )
        for i, prompt in enumerate(prompts)
    ]
    engine = make_engine(max_step_tokens=40)
    alone = [await tokens_of(engine, request) for request in requests]
    assert await all_tokens(engine, requests) == alone
    fresh = make_engine()
    for request, tokens in zip(requests[::4], alone[::4], strict=True):
        for delivered in (1, 7, 29):
            assert await tokens_of(fresh, replace(request, output_token_ids=tuple(tokens[:delivered]))) == tokens


async def test_choices_of_one_request_differ(make_engine: MakeEngine) -> None:
    engine = make_engine()
    sampling = SamplingParams(seed=5, temperature=1.5)
    first, second = await all_tokens(engine, [request_for([1, 2, 3], sampling=sampling, choice=c) for c in (0, 1)])
    assert first != second


async def test_an_attempt_that_had_finished_ends_at_once(make_engine: MakeEngine) -> None:
    engine = make_engine()
    full = request_for([1, 2], 3, output_token_ids=(4, 5, 6))
    stopped = request_for([1, 2], 9, output_token_ids=(4, 5), stop_token_ids=(5,))
    assert await collect(engine, full) == [TokenBatch(3, finish_reason=FinishReason.LENGTH)]
    assert await collect(engine, stopped) == [TokenBatch(2, finish_reason=FinishReason.STOP)]


async def test_stop_ids_end_the_output_and_min_tokens_holds_them_back(make_engine: MakeEngine) -> None:
    engine = make_engine()
    free = await tokens_of(engine, request_for([1, 2, 3], 30))
    stop = free[4]
    first = free.index(stop)
    replies = await collect(engine, request_for([1, 2, 3], 30, stop_token_ids=(stop,)))
    ids = [token for reply in replies for token in reply.token_ids]  # type: ignore[union-attr]
    assert ids == free[: first + 1], "the stop token is emitted and is the last"
    assert replies[-1].finish_reason is FinishReason.STOP  # type: ignore[union-attr]
    held = SamplingParams(seed=0, temperature=0, min_tokens=first + 3)
    longer = await tokens_of(engine, request_for([1, 2, 3], 30, sampling=held, stop_token_ids=(stop,)))
    assert stop not in longer[: first + 3]
    assert len(longer) > first + 3


async def test_the_last_batch_carries_the_counters_and_logprobs_ride_along(make_engine: MakeEngine) -> None:
    engine = make_engine()
    prompt = prompts_of([40])[0]
    await tokens_of(engine, request_for(prompt))
    sampling = SamplingParams(seed=0, temperature=0, logprobs=2)
    replies = await collect(engine, request_for(prompt, 5, sampling=sampling))
    batches = [reply for reply in replies if isinstance(reply, TokenBatch) and reply.token_ids]
    assert sum(len(batch.logprobs or ()) for batch in batches) == 5
    assert all(entry.top[0][0] == token for b in batches for token, entry in zip(b.token_ids, b.logprobs, strict=True))
    stats = batches[-1].stats
    assert stats is not None
    assert stats.cached_prompt_tokens == 32
    assert stats.prefill_s > 0


class Blocking(SdpaAttention):
    """Attention that waits for leave, and notes how many sequences each call had: steps without a clock."""

    last: Blocking

    def __init__(self) -> None:
        self.leave = threading.Event()
        self.leave.set()
        self.spans: list[int] = []
        self.stops_at: int | None = None
        """After a call that had so many sequences the next one waits for leave again."""
        self.stopped = threading.Event()
        Blocking.last = self

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, params: AttentionParams, step: list[Span]
    ) -> torch.Tensor:
        assert self.leave.wait(60), "nobody has opened the gate"
        self.spans.append(len(step))
        if len(step) == self.stops_at:
            self.stops_at = None
            self.leave.clear()
            self.stopped.set()
        return super().attend(query, keys, values, params, step)


async def test_closing_a_stream_stops_its_work_within_a_step(make_engine: MakeEngine) -> None:
    engine = make_engine(backends=(Blocking,))
    gate = Blocking.last
    gate.leave.clear()
    gate.spans.clear()
    stream = engine.generate(request_for([1, 2, 3], 200))
    first = asyncio.ensure_future(anext(stream))
    other = asyncio.create_task(tokens_of(engine, request_for([4, 5], 200)))
    await until(lambda: engine.stats().running + engine.stats().waiting == 2)
    gate.stops_at = 2
    gate.leave.set()
    await until(gate.stopped.is_set)
    seen = len(gate.spans)
    await first
    await stream.aclose()
    gate.leave.set()
    assert len(await other) == 200
    assert gate.spans[seen - 1] == 2, "they ran together"
    layers = 3
    assert set(gate.spans[seen + layers - 1 :]) == {1}, "only the step that was running had the closed stream"


async def test_cancelling_the_caller_stops_the_work(make_engine: MakeEngine) -> None:
    engine = make_engine(max_running=1, backends=(Blocking,))
    Blocking.last.leave.clear()
    running = asyncio.create_task(collect(engine, request_for([1, 2, 3], 250)))
    waiting = asyncio.create_task(collect(engine, request_for([1, 2, 3], 250)))
    await until(lambda: engine.stats().running == 1 and engine.stats().waiting == 1)
    for task in (waiting, running):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    Blocking.last.leave.set()
    await until(lambda: not engine.stats().running and not engine.stats().waiting)
    assert engine.stats().used_pages == 0
    assert engine.stats().counters.output_tokens <= 1, "of the step that was running"


@pytest.mark.parametrize(
    ("fields", "code", "word"),
    [
        ({"prompt": []}, FailureCode.INVALID_REQUEST, "empty"),
        ({"prompt": [1] * 250, "new_tokens": 7}, FailureCode.CONTEXT_LENGTH_EXCEEDED, str(CONTEXT)),
        ({"prompt": [VOCAB]}, FailureCode.INVALID_REQUEST, "vocabulary"),
        ({"prompt": [-1]}, FailureCode.INVALID_REQUEST, "vocabulary"),
        ({"sampling": SamplingParams(seed=0, logit_bias=((999, 1.0),))}, FailureCode.INVALID_REQUEST, "999"),
        ({"sampling": SamplingParams(seed=0, logprobs=1000)}, FailureCode.INVALID_REQUEST, "logprobs"),
        ({"stop_token_ids": (VOCAB + 1,)}, FailureCode.INVALID_REQUEST, "vocabulary"),
        ({"predicted_token_ids": (1, VOCAB)}, FailureCode.INVALID_REQUEST, "vocabulary"),
        ({"weight": 0.0}, FailureCode.INVALID_REQUEST, "weight"),
    ],
)
async def test_requests_that_can_not_be_served_are_refused(
    fields: dict[str, Any], code: FailureCode, word: str, make_engine: MakeEngine
) -> None:
    engine = make_engine()
    predicted = fields.pop("predicted_token_ids", ())
    request = replace(request_for(**({"prompt": [1, 2]} | fields)), predicted_token_ids=predicted)
    (failure,) = await collect(engine, request)
    assert isinstance(failure, Failure)
    assert failure.code is code
    assert word in failure.message
    assert await tokens_of(engine, request_for([1, 2], 3)), "and the engine goes on"


async def test_the_cache_bounds_a_request_as_the_context_does(make_engine: MakeEngine) -> None:
    page_bytes = 16 * sum(layer.shape.bytes_per_token for layer in make_engine()._core.runner.layers.values())
    engine = make_engine(kv_cache_memory=6 * page_bytes)
    assert engine.capacity.context_tokens == 96
    (failure,) = await collect(engine, request_for([1] * 90, 7))
    assert isinstance(failure, Failure)
    assert "96" in failure.message
    assert len(await tokens_of(engine, request_for([1] * 90, 6))) == 6


async def test_other_weights_are_refused(make_engine: MakeEngine) -> None:
    request = replace(request_for([1]), fingerprint=Fingerprint("other"))
    (failure,) = await collect(make_engine(), request)
    assert isinstance(failure, Failure)
    assert failure.code is FailureCode.WRONG_WEIGHTS


async def test_a_full_queue_is_said_at_once(make_engine: MakeEngine) -> None:
    engine = make_engine(max_running=1, max_waiting=1, backends=(Blocking,))
    Blocking.last.leave.clear()
    tasks = [asyncio.create_task(collect(engine, request_for([1, 2], 100))) for _ in range(2)]
    await asyncio.sleep(0)
    (failure,) = await collect(engine, request_for([1, 2], 100))
    assert isinstance(failure, Failure)
    assert failure.code is FailureCode.OVERLOADED
    assert failure.retry_after_s
    Blocking.last.leave.set()
    assert all(replies[-1].finish_reason for replies in await asyncio.gather(*tasks))  # type: ignore[union-attr]


async def test_a_request_on_its_way_to_a_step_is_counted_once(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was missed for a moment would let in one too many."""
    engine = make_engine()
    counts: list[int] = []

    def count() -> None:
        stats = engine.stats()
        counts.append(stats.running + stats.waiting)

    def watched(method: Callable[[Any], None]) -> Callable[[Any], None]:
        def call(sequence: Any) -> None:
            count()
            method(sequence)
            count()

        return call

    scheduler = engine._core.scheduler
    monkeypatch.setattr(scheduler, "add", watched(scheduler.add))
    monkeypatch.setattr(scheduler.line, "leave", watched(scheduler.line.leave))
    await tokens_of(engine, request_for([1, 2, 3], 2))
    assert counts == [1] * 4, "before and after it is queued, and before and after it is taken from the queue"


async def test_a_deadline_ends_a_stream(make_engine: MakeEngine) -> None:
    engine = make_engine()
    replies = await collect(engine, request_for([1, 2], 200, remaining_s=0.02))
    assert isinstance(replies[-1], Failure)
    assert replies[-1].code is FailureCode.DEADLINE_EXCEEDED


async def test_silence_is_filled_with_empty_batches_and_health_tells_how_long_a_step_runs(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_app.engine.engine.HEARTBEAT_S", 0.01)
    engine = make_engine(backends=(Blocking,))
    Blocking.last.leave.clear()
    stream = engine.generate(request_for([1, 2, 3], 5))
    assert await anext(stream) == TokenBatch(0)
    await until(lambda: engine.health().step_running_s > 0)
    running_s = engine.health().step_running_s
    assert await anext(stream) == TokenBatch(0)
    assert engine.health().step_running_s > running_s
    assert engine.health().alive
    Blocking.last.leave.set()
    rest = [reply async for reply in stream]
    assert sum(len(reply.token_ids) for reply in rest) == 5  # type: ignore[union-attr]
    await until(lambda: engine.health().step_running_s == 0)


async def test_heartbeats_stand_where_the_reader_is_however_quick_the_engine(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a heartbeat that is ahead of its tokens the ingress would think that it had overtaken some."""
    monkeypatch.setattr("serve_app.engine.engine.HEARTBEAT_S", 0.01)
    engine = make_engine()
    step, command = engine._core.runner.step, engine._command
    second_step, leave = threading.Event(), threading.Event()

    def one_step_and_then_pause(chunks: Any) -> Any:
        if engine.stats().counters.steps == 1:
            second_step.set()
            assert leave.wait(60), "nobody has opened the gate"
        return step(chunks)

    def after_the_first_token(do: Callable[[], None], pending: int = 0) -> bool:
        done = command(do, pending)
        assert not pending or second_step.wait(60), "the engine has made no token"
        return done

    monkeypatch.setattr(engine._core.runner, "step", one_step_and_then_pause)
    monkeypatch.setattr(engine, "_command", after_the_first_token)
    stream = engine.generate(request_for([1, 2, 3], 5, output_token_ids=(4, 5)))
    first, *heartbeats = [await anext(stream) for _ in range(3)]
    leave.set()
    assert isinstance(first, TokenBatch)
    assert (first.first_index, len(first.token_ids)) == (2, 1)
    assert heartbeats == [TokenBatch(3)] * 2
    assert sum([len(reply.token_ids) async for reply in stream]) == 2  # type: ignore[union-attr]


class Failing(SdpaAttention):
    """Breaks after so many calls as it is told."""

    calls_left: int | None = None
    error: BaseException

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, params: AttentionParams, step: list[Span]
    ) -> torch.Tensor:
        if Failing.calls_left is not None:
            Failing.calls_left -= 1
            if Failing.calls_left < 0:
                raise Failing.error
        return super().attend(query, keys, values, params, step)


@pytest.mark.parametrize("kind", [RuntimeError, BaseException])  # a panic of Rust code is no Exception
async def test_an_engine_that_breaks_tells_every_stream_and_its_health(
    kind: type[BaseException], make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(backends=(Failing,))
    monkeypatch.setattr(Failing, "error", kind("the device is gone"), raising=False)
    monkeypatch.setattr(Failing, "calls_left", 10)
    replies = await collect(engine, request_for([1, 2, 3], 200))
    assert isinstance(replies[-1], Failure)
    assert any(reply.token_ids for reply in replies[:-1] if isinstance(reply, TokenBatch)), "it had begun"
    assert replies[-1].code is FailureCode.REPLICA_LOST, "so that the stream goes on elsewhere"
    assert not engine.health().alive
    assert "the device is gone" in (engine.health().error or "")
    (refused,) = await collect(engine, request_for([1], 2))
    assert isinstance(refused, Failure)
    assert refused.code is FailureCode.NOT_READY, "never taken, so that it is held against nobody"


async def test_stopping_tells_what_was_running(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.engine.engine.HEARTBEAT_S", 0.01)
    engine = make_engine(backends=(Blocking,))
    Blocking.last.leave.clear()
    stream = engine.generate(request_for([1, 2, 3], 200))
    assert await anext(stream) == TokenBatch(0)
    stop = asyncio.create_task(asyncio.to_thread(engine.stop))
    await until(lambda: engine._stopping)
    Blocking.last.leave.set()
    await stop
    replies = [reply async for reply in stream]
    assert isinstance(replies[-1], Failure)
    assert replies[-1].code is FailureCode.REPLICA_LOST


class NotANumber(SdpaAttention):
    """Gives NaN once a sequence has 60 tokens (the load checks' sequences are shorter, or far longer)."""

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, params: AttentionParams, step: list[Span]
    ) -> torch.Tensor:
        output = super().attend(query, keys, values, params, step)
        for span in step:
            if 60 <= span.kv_len <= 70:
                output[span.query_start : span.query_start + span.query_len] = float("nan")
        return output


async def test_numbers_gone_wrong_end_that_stream_only(make_engine: MakeEngine) -> None:
    engine = make_engine(backends=(NotANumber,))
    bad, good = await asyncio.gather(
        collect(engine, request_for([1] * 55, 50)), collect(engine, request_for([2] * 5, 50))
    )
    assert isinstance(bad[-1], Failure)
    assert bad[-1].code is FailureCode.ENGINE_FAILED
    assert good[-1].finish_reason is FinishReason.LENGTH  # type: ignore[union-attr]


class WrongWindow(SdpaAttention):
    """Ignores the window."""

    name = "wrong-window"

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, params: AttentionParams, step: list[Span]
    ) -> torch.Tensor:
        return super().attend(query, keys, values, AttentionParams(params.scaling, None, params.softcap), step)


async def test_a_wrong_kernel_is_replaced_by_the_plain_path_and_said(
    make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine("mistral", backends=(WrongWindow, PlainAttention))
    assert engine.capacity.attention_backend == "plain"
    assert "wrong-window failed its check" in engine.capacity.notes[0]
    assert "wrong-window failed its check" in caplog.text
    prompt = prompts_of([40])[0]
    assert await tokens_of(engine, request_for(prompt)) == greedy_reference("mistral", prompt, 20)


def test_no_right_kernel_means_no_service(make_engine: MakeEngine) -> None:
    with pytest.raises(UnsupportedModelError, match="MistralForCausalLM can't be served"):
        make_engine("mistral", backends=(WrongWindow,))


@pytest.mark.parametrize(
    "model",
    [
        FalconForCausalLM(FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)),
        MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)),
    ],
    ids=lambda model: type(model).__name__,
)
def test_models_without_the_attention_interface_are_refused_by_name(model: Any, make_engine: MakeEngine) -> None:
    with pytest.raises(UnsupportedModelError, match=type(model).__name__):
        make_engine(model=model.eval())


def windowed(kind: str, window: int) -> Any:
    """A model whose window is a matter of its masks only, or, of Llama, of nobody."""
    if kind == "llama":
        config: Any = LlamaConfig(**SIZES, sliding_window=window)
    elif kind == "phimoe":
        config = PhimoeConfig(**SIZES, num_local_experts=4, sliding_window=window)
    else:
        few = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
        use = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 3}
        config = Qwen2MoeConfig(**SIZES, **few, **use, shared_expert_intermediate_size=48)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(("kind", "layer"), [("qwen2_moe", 0), ("phimoe", 0)])
def test_a_window_that_only_the_masks_know_is_refused(kind: str, layer: int, make_engine: MakeEngine) -> None:
    with pytest.raises(UnsupportedModelError, match=f"layer {layer} does not pass its sliding window to attention"):
        make_engine(model=windowed(kind, 64))


@pytest.mark.parametrize(("kind", "window"), [("qwen2_moe", CONTEXT), ("phimoe", CONTEXT), ("llama", 64)])
def test_a_window_that_hides_nothing_is_not(kind: str, window: int, make_engine: MakeEngine) -> None:
    make_engine(model=windowed(kind, window))


def test_a_cache_too_small_for_anything_says_what_to_do(make_engine: MakeEngine) -> None:
    with pytest.raises(EngineError, match=r"engine\.kv_cache_memory"):
        make_engine(kv_cache_memory=1000)


class LargePages(SdpaAttention):
    """Wants pages in multiples of 16, as varlen does in multiples of 256."""

    page_multiple = 16


def test_page_sizes_of_other_kernels_are_refused(make_engine: MakeEngine) -> None:
    assert make_engine(page_tokens=32).capacity.page_tokens == 32
    with pytest.raises(EngineError, match="multiple of 16"):
        make_engine(page_tokens=40, backends=(LargePages,))


def test_an_explicit_kernel_that_can_not_serve_is_said(make_engine: MakeEngine) -> None:
    engine = make_engine(attention="varlen")
    assert engine.capacity.attention_backend == "plain"
    assert "engine.attention varlen can't be used" in engine.capacity.notes[0]


async def test_who_computes_alone_is_told_before_each_of_its_steps(make_engine: MakeEngine) -> None:
    told: list[GenerationRequest] = []
    engine = make_engine(max_step_tokens=8, max_running=4, before_isolated=told.append)
    suspect = replace(request_for(range(40, 60), 5), isolated=True)
    await all_tokens(engine, [request_for(range(30), 5), suspect])
    assert told == [suspect] * 3  # chunks of 8, 8 and 4; after its first token it has company
