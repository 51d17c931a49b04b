"""An engine whose steps come from recordings: the tokens are the model's own, and none is held back.

No GPU: `Recorder` stands in for CUDA graphs, so that everything around them is what a GPU's engine runs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from tabled_attention import Recorder, TabledPlain
from tiny_models import collect, greedy_reference, prompts_of, request_for, tokens_of

from serve_app.core import Failure, FailureCode, SamplingParams
from serve_app.engine.attention.plain import PlainAttention
from serve_app.engine.engine import Engine

MakeEngine = Callable[..., Engine]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Records where an engine would capture CUDA graphs."""
    recorder = Recorder()
    monkeypatch.setattr("serve_app.engine.recording.CudaCapture", lambda device: recorder)
    return recorder


def on_graphs(make_engine: MakeEngine, kind: str = "llama", **settings: Any) -> Engine:
    engine = make_engine(
        kind, backends=[TabledPlain, PlainAttention], **({"max_running": 4, "max_step_tokens": 6} | settings)
    )
    assert engine.capacity.attention_backend == "tabled"
    assert engine.capacity.notes == ()
    return engine


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
async def test_the_tokens_are_those_of_generate(kind: str, recorder: Recorder, make_engine: MakeEngine) -> None:
    prompts = prompts_of((3, 17, 40, 90, 5, 33))
    expected = [greedy_reference(kind, prompt, 20) for prompt in prompts]
    engine = on_graphs(make_engine, kind)
    before = recorder.replayed
    found = await asyncio.gather(*(tokens_of(engine, request_for(prompt)) for prompt in prompts))
    assert list(found) == expected
    assert recorder.replayed - before == engine.stats().counters.steps, "every step was a replay"


def test_no_graphs_where_none_are_wanted_or_possible(recorder: Recorder, make_engine: MakeEngine) -> None:
    stages: list[str] = []
    for settings in ({"backends": [TabledPlain], "cuda_graphs": False}, {"backends": [PlainAttention]}):
        engine = make_engine(**settings, on_stage=lambda stage: stages.append(stage.stage))
        assert engine._core.runner.graphs is None
    assert recorder.recorded == 0
    assert not any("CUDA" in stage for stage in stages)


async def test_sampled_tokens_do_not_depend_on_company_in_exact_mode(
    recorder: Recorder, make_engine: MakeEngine
) -> None:
    sampling = SamplingParams(seed=5, temperature=1.1)
    requests = [request_for(prompt, 30, sampling=sampling) for prompt in prompts_of((3, 29, 60))]
    engine = on_graphs(make_engine, batch_invariant=True)
    together = await asyncio.gather(*(tokens_of(engine, request) for request in requests))
    assert recorder.recorded == 1, "all steps have one size"
    assert engine.capacity.batch_invariant
    assert list(together) == [await tokens_of(engine, request) for request in requests]


async def test_what_came_before_a_failure_is_delivered_before_it(
    recorder: Recorder, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time is up while the sixth step runs: its token is still held back then."""
    engine = on_graphs(make_engine)
    await tokens_of(engine, request_for([1, 2, 3], 2))
    run, steps = recorder_run(engine), 0

    def counting(inputs: Any) -> Any:
        nonlocal steps
        steps += 1
        return run(inputs)

    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + (1000 if steps >= 6 else 0))
    monkeypatch.setattr(engine._core.runner.graphs, "run", counting)
    monkeypatch.setattr("serve_app.engine.core.time", clock)
    replies = await collect(engine, request_for(prompts_of((3,))[0], 250, remaining_s=500))
    failure, batches = replies[-1], replies[:-1]
    assert isinstance(failure, Failure)
    assert failure.code == FailureCode.DEADLINE_EXCEEDED
    tokens = [token for batch in batches if not isinstance(batch, Failure) for token in batch.token_ids]
    assert steps == 6
    assert len(tokens) >= 6
    assert tokens == greedy_reference("llama", prompts_of((3,))[0], len(tokens))


async def test_a_token_is_delivered_though_no_step_follows(recorder: Recorder, make_engine: MakeEngine) -> None:
    """The last token of the only stream, and of one whose neighbour is dropped while it waits."""
    engine = on_graphs(make_engine)
    neighbour = engine.generate(request_for([5, 6, 7], 200))
    await anext(neighbour)
    only = asyncio.create_task(tokens_of(engine, request_for([1, 2, 3], 5)))
    await neighbour.aclose()
    assert await asyncio.wait_for(only, 20) == greedy_reference("llama", [1, 2, 3], 5)
    assert await asyncio.wait_for(tokens_of(engine, request_for([9], 1)), 20) == greedy_reference("llama", [9], 1)


async def test_a_failing_step_ends_streams_after_their_tokens(
    recorder: Recorder, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = on_graphs(make_engine)
    run, left = recorder_run(engine), 6

    def breaks(inputs: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise RuntimeError("CUDA error: unspecified launch failure")
        return run(inputs)

    monkeypatch.setattr(engine._core.runner.graphs, "run", breaks)
    replies = await collect(engine, request_for([1, 2, 3], 50))
    assert isinstance(replies[-1], Failure)
    assert replies[-1].code == FailureCode.REPLICA_LOST
    tokens = [token for reply in replies[:-1] if not isinstance(reply, Failure) for token in reply.token_ids]
    assert tokens == greedy_reference("llama", [1, 2, 3], 6)
    assert not engine.health().alive


def recorder_run(engine: Engine) -> Callable[[Any], Any]:
    graphs = engine._core.runner.graphs
    assert graphs is not None
    return graphs.run
