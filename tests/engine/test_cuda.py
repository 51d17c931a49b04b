"""The engine on a GPU: steps are served from graphs, and the tokens are the model's own.

The kernels by themselves: test_kernels.py."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import prompts_of, request_for, tiny_model, tokens_of

from serve_app.core import SamplingParams
from serve_app.engine.attention.base import AttentionParams
from serve_app.engine.attention.kernel_check import check_attention
from serve_app.engine.attention.varlen import VarlenAttention
from serve_app.engine.engine import Engine
from serve_app.engine.kv_cache import LayerShape

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

MakeEngine = Callable[..., Engine]
WINDOWED = ("llama", "mistral", "qwen2", "qwen3")


def on_gpu(kind: str, dtype: torch.dtype) -> Any:
    return tiny_model(kind).to("cuda", dtype)


def graphs_of(engine: Engine) -> list[int]:
    """Tokens of the steps that are served from graphs."""
    graphs = engine._core.runner.graphs
    return [] if graphs is None else [shape.rows for shape in graphs.shapes]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 64, 4), (8, 128, 8), (1, 128, 8), (4, 96, 4)])
@pytest.mark.parametrize("window", [None, 64, 4096])
def test_the_varlen_kernel_is_right(dtype: torch.dtype, shape: tuple[int, int, int], window: int | None) -> None:
    kv_heads, dim, query_heads = shape
    layer = LayerShape(kv_heads, dim, dim, dtype, torch.device("cuda", 0))
    params = AttentionParams(dim**-0.5, window)
    assert VarlenAttention.refusal(layer, params) is None
    assert check_attention(VarlenAttention(), layer, query_heads, params) is None


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "gemma2", "gemma3", "gpt2"])
async def test_greedy_in_float32_is_generate_token_for_token(kind: str, make_engine: MakeEngine) -> None:
    model = on_gpu(kind, torch.float32)
    model.set_attn_implementation("eager")
    prompts = prompts_of((3, 17, 40, 90))
    expected = [
        model.generate(torch.tensor([prompt], device="cuda"), max_new_tokens=20, min_new_tokens=20, do_sample=False)[
            0, len(prompt) :
        ].tolist()
        for prompt in prompts
    ]
    for attention in ("auto", "sdpa"):
        engine = make_engine(model=model, max_step_tokens=32, threads=None, attention=attention)
        assert engine.capacity.notes == ()
        assert engine.capacity.attention_backend == ("sdpa" if attention == "sdpa" else "triton")
        assert bool(graphs_of(engine)) == (attention == "auto")
        found = await asyncio.gather(*(tokens_of(engine, request_for(prompt)) for prompt in prompts))
        assert list(found) == expected


@pytest.mark.parametrize("kind", WINDOWED)
async def test_16_bit_models_are_served_by_varlen(kind: str, make_engine: MakeEngine) -> None:
    model = on_gpu(kind, torch.bfloat16)
    engine = make_engine(model=model, attention="varlen", kv_cache_memory=None, gpu_memory_fraction=0.5)
    assert engine.capacity.notes == ()
    assert engine.capacity.attention_backend == "varlen"
    assert engine.capacity.page_tokens == 256
    sampling = SamplingParams(seed=3, temperature=0.9)
    requests = [request_for(prompt, 60, sampling=sampling) for prompt in prompts_of((3, 17, 40, 90, 180))]
    found = await asyncio.gather(*(tokens_of(engine, request) for request in requests))
    assert [len(tokens) for tokens in found] == [60] * 5


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
async def test_graphs_change_no_token(dtype: torch.dtype, batch_invariant: bool, make_engine: MakeEngine) -> None:
    model = on_gpu("llama", dtype)
    sampling = SamplingParams(seed=3, temperature=0.9)
    requests = [request_for(prompt, 60, sampling=sampling) for prompt in prompts_of((3, 17, 40, 90, 180))]
    found = []
    for graphs in (True, False):
        engine = make_engine(
            model=model, cuda_graphs=graphs, batch_invariant=batch_invariant, max_step_tokens=64, attention="triton"
        )
        assert engine.capacity.notes == ()
        assert engine.capacity.batch_invariant or not batch_invariant
        assert graphs_of(engine) == ([] if not graphs else [64] if batch_invariant else [1, 2, 4, 8, 16, 32, 64])
        found.append(await asyncio.gather(*(tokens_of(engine, request) for request in requests)))
        if batch_invariant:
            found.append([await tokens_of(engine, request) for request in requests])
    if batch_invariant or dtype == torch.float32:
        assert all(other == found[0] for other in found[1:])


@pytest.mark.parametrize("kind", WINDOWED)
async def test_16_bit_models_are_served_from_graphs_within_their_memory(kind: str, make_engine: MakeEngine) -> None:
    settings = {"kv_cache_memory": None, "gpu_memory_fraction": 0.5, "max_running": 200}
    engine = make_engine(model=on_gpu(kind, torch.bfloat16), context=200_000, **settings)
    assert engine.capacity.notes == ()
    assert engine.capacity.attention_backend == "triton"
    assert len(graphs_of(engine)) == 11
    free, total = torch.cuda.mem_get_info()
    assert total - free <= 0.5 * total
    sampling = SamplingParams(seed=3, temperature=0.9)
    requests = [request_for(prompt, 60, sampling=sampling) for prompt in prompts_of((3, 17, 40, 90, 180))]
    found = await asyncio.gather(*(tokens_of(engine, request) for request in requests))
    assert [len(tokens) for tokens in found] == [60] * 5


async def test_a_model_that_waits_for_the_device_is_served_without_graphs(make_engine: MakeEngine) -> None:
    model = on_gpu("llama", torch.float32)
    prompt = prompts_of((17,))[0]
    expected = await tokens_of(make_engine(model=model, cuda_graphs=False), request_for(prompt))
    model.model.norm.register_forward_hook(lambda module, inputs, output: output * float(output.isfinite().all()))
    engine = make_engine(model=model)
    assert graphs_of(engine) == []
    assert len(engine.capacity.notes) == 1
    assert "can't be recorded" in engine.capacity.notes[0]
    assert await tokens_of(engine, request_for(prompt)) == expected
