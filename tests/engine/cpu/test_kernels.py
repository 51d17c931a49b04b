"""The compiled CPU kernels: right against torch and the plain path, and the same bits for a row in any company."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from exploring import cases
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from tiny_models import (
    ARCHITECTURES,
    SIZES,
    all_tokens,
    collect,
    greedy_reference,
    prompts_of,
    request_for,
    tiny_model,
    tokens_of,
)
from transformers import HunYuanMoEV1Config, HunYuanMoEV1ForCausalLM

from serve_app.config import EngineConfig
from serve_app.core import GenerationRequest, SamplingParams, TokenBatch
from serve_app.engine.attention.base import AttentionParams
from serve_app.engine.attention.kernel_check import check_attention
from serve_app.engine.cpu.attention import CpuAttention
from serve_app.engine.cpu.library import Kernels, load_kernels
from serve_app.engine.cpu.linear import PackedLinear, pack_linears
from serve_app.engine.engine import Engine
from serve_app.engine.engine_error import EngineError, UnsupportedModelError
from serve_app.engine.kv_cache import LayerShape

MakeEngine = Callable[..., Engine]
CPU = torch.device("cpu")


@pytest.mark.parametrize(("out", "inner"), [(1, 1), (31, 7), (32, 64), (33, 100), (576, 576), (1000, 65)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_product_is_torchs(kernels: Kernels, out: int, inner: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(out)
    weight = torch.randn(out, inner, generator=generator)
    offset = torch.randn(out, generator=generator) if bias else None
    x = torch.randn(3, 67, inner, generator=generator)
    packed = PackedLinear(kernels, weight, offset)
    exact = F.linear(x.double(), weight.double(), None if offset is None else offset.double())
    assert (packed(x) - exact).abs().max() <= 1e-5 * inner
    for rows in (1, 2, 3, 12, 13, 48, 49, 60):
        assert torch.equal(packed(x[1, 5 : 5 + rows]), packed(x)[1, 5 : 5 + rows])
    transposed = PackedLinear(kernels, weight.t().contiguous().t(), offset)
    assert torch.equal(transposed(x), packed(x)), "any strides"


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_a_bit(kernels: Kernels, threads: int) -> None:
    weight, x = torch.randn(333, 50, generator=torch.Generator().manual_seed(1)), torch.ones(20, 50) * 0.3
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = PackedLinear(kernels, weight, None)(x)
        torch.set_num_threads(threads)
        assert torch.equal(PackedLinear(kernels, weight, None)(x), one)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "params",
    [
        AttentionParams(0.25),
        AttentionParams(0.25, 1),
        AttentionParams(0.25, 100),
        AttentionParams(0.25, None, 5.0),
        AttentionParams(0.1, 9, 3.0),
    ],
)
@pytest.mark.parametrize("shape", [(2, 16, 16), (4, 8, 32), (1, 24, 80), (3, 64, 64), (1, 128, 128)])
@pytest.mark.parametrize("page_tokens", [16, 64])
def test_attention_passes_the_check(
    kernels: Kernels, params: AttentionParams, shape: tuple[int, int, int], page_tokens: int
) -> None:
    layer = LayerShape(*shape, torch.float32, CPU)
    backend = CpuAttention(kernels, page_tokens)
    assert backend.refusal(layer, params) is None
    assert check_attention(backend, layer, 12, params, page_tokens) is None


@pytest.mark.usefixtures("kernels")
def test_any_page_size_that_suits_the_kernel_serves_with_it(make_engine: MakeEngine, kernel_folder: Path) -> None:
    for page_tokens in (16, 32, 1024):
        engine = make_engine(kernel_cache=kernel_folder, page_tokens=page_tokens)
        assert engine.capacity.attention_backend == "cpu"
        assert engine.capacity.page_tokens == page_tokens
        assert engine.capacity.batch_invariant
    with pytest.raises(EngineError, match="page_tokens 8 must be a multiple of 16 for the cpu attention kernel"):
        make_engine(kernel_cache=kernel_folder, page_tokens=8)


def test_attention_says_what_it_can_not_do() -> None:
    assert "float32" in (CpuAttention.refusal(LayerShape(2, 16, 16, torch.bfloat16, CPU), AttentionParams(1.0)) or "")
    assert "multiple of 16" in (
        CpuAttention.refusal(LayerShape(2, 20, 20, torch.float32, CPU), AttentionParams(1.0)) or ""
    )


def test_the_library_is_compiled_once(kernels: Kernels, kernel_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (made,) = kernel_folder.rglob("*.so")
    before = made.stat().st_mtime_ns
    load_kernels(kernel_folder)
    assert made.stat().st_mtime_ns == before


def use_compiler(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the kernels compiled by a line of shell."""
    compiler = folder / "cxx"
    compiler.write_text(f"#!/bin/sh\n{command}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))


def test_without_a_compiler_torch_serves_and_it_is_said(
    make_engine: MakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_compiler("echo 'error: nothing works here' >&2; exit 1", tmp_path, monkeypatch)
    with pytest.raises(EngineError, match="nothing works here"):
        load_kernels(tmp_path)
    engine = make_engine(model=tiny_model("llama"), kernel_cache=tmp_path)
    assert engine.capacity.attention_backend == "sdpa"
    assert "nothing works here" in engine.capacity.notes[0]


@pytest.mark.skipif("avx512f" not in Path("/proc/cpuinfo").read_text(), reason="its vectors are narrower anyhow")
def test_narrower_vectors_are_exact_too(
    make_engine: MakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels of a processor with AVX2: other copies of each function, of which none may round differently."""
    use_compiler('exec g++ "$@" -mno-avx512f', tmp_path, monkeypatch)
    for kind in ("llama", "mistral"):
        engine = make_engine(model=tiny_model(kind), kernel_cache=tmp_path)
        assert engine.capacity.attention_backend == "cpu"
        assert engine.capacity.batch_invariant, kind


def test_a_wrong_kernel_is_not_used(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels.linear

    def wrong(x: int, ldx: int, parts: int, count: int, m: int, k: int) -> None:
        right(x, ldx, parts, count, m, k - 1 if m > 1 else k)

    monkeypatch.setattr(kernels, "linear", wrong)
    with pytest.raises(EngineError, match="wrong on this machine"):
        pack_linears(tiny_model("llama"), kernels)


@pytest.mark.parametrize("kind", ARCHITECTURES)
async def test_greedy_is_generate_token_for_token(
    kind: str, kernels: Kernels, kernel_folder: Path, make_engine: MakeEngine
) -> None:
    prompts = prompts_of((1, 3, 17, 33, 64, 100))
    expected = [greedy_reference(kind, prompt, 20) for prompt in prompts]
    engine = make_engine(model=tiny_model(kind), kernel_cache=kernel_folder, max_step_tokens=48)
    assert engine.capacity.attention_backend == "cpu"
    assert engine.capacity.batch_invariant
    assert await all_tokens(engine, [request_for(prompt) for prompt in prompts]) == expected


@pytest.mark.usefixtures("kernels")
def test_a_model_that_looks_into_its_linear_layers_is_told_what_may_serve_it(
    make_engine: MakeEngine, kernel_folder: Path
) -> None:
    config = HunYuanMoEV1Config(**SIZES, head_dim=16, num_experts=4, moe_topk=2, moe_intermediate_size=48)
    with pytest.raises(
        UnsupportedModelError, match=r"HunYuanMoEV1ForCausalLM can't be served: .*; engine\.cpu_kernels: false may"
    ):
        make_engine(model=HunYuanMoEV1ForCausalLM(config).eval(), kernel_cache=kernel_folder)
    model = HunYuanMoEV1ForCausalLM(config).eval()
    assert make_engine(model=model, kernel_cache=kernel_folder, cpu_kernels=False).capacity.attention_backend == "sdpa"


async def bits(engine: Engine, request: GenerationRequest) -> list[tuple[int, float]]:
    """Each token with its logprob, to the bit, that the attempt itself made."""
    found: list[tuple[int, float]] = []
    for reply in await collect(engine, request):
        assert isinstance(reply, TokenBatch)
        found.extend((t, p.logprob) for t, p in zip(reply.token_ids, reply.logprobs or (), strict=True))
    return found


@pytest.fixture(scope="module")
def exact_engines(kernels: Kernels, kernel_folder: Path) -> list[Engine]:
    """One that has all the room it wants, and one that preempts, chunks finely and uses two threads."""
    engines = []
    for cache, threads, step in (("16MiB", 1, 512), ("160KiB", 2, 11)):
        config = EngineConfig(kv_cache_memory=cache, threads=threads, max_step_tokens=step, max_running=8)  # type: ignore[arg-type]
        engines.append(
            Engine(
                tiny_model("mistral"),
                config,
                context_tokens=200,
                fingerprint=request_for([1]).fingerprint,
                kernel_cache=kernel_folder,
            )
        )
    return engines


@settings(max_examples=cases(12, exploring=125), deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=2, max_size=8),
    temperature=st.sampled_from([0.0, 0.7, 1.3]),
    penalty=st.sampled_from([0.0, 0.6]),
    top_p=st.sampled_from([1.0, 0.8]),
    cut=st.integers(0, 23),
    seed=st.integers(0, 1000),
)
def test_the_bits_are_the_same_alone_in_a_crowd_and_continued(
    exact_engines: list[Engine],
    lengths: list[int],
    temperature: float,
    penalty: float,
    top_p: float,
    cut: int,
    seed: int,
) -> None:
    roomy, cramped = exact_engines
    sampling = SamplingParams(seed=seed, temperature=temperature, frequency_penalty=penalty, top_p=top_p, logprobs=0)
    requests = [request_for(p, 24, sampling=sampling, choice=i) for i, p in enumerate(prompts_of(lengths, seed))]

    async def compare() -> None:
        alone = [await bits(roomy, request) for request in requests]
        crowd = await asyncio.gather(*(bits(cramped, request) for request in requests))
        assert list(crowd) == alone
        delivered = tuple(token for token, _ in alone[0][:cut])
        continued = await bits(cramped, replace(requests[0], output_token_ids=delivered))
        assert continued == alone[0][cut:]

    asyncio.run(compare())


def test_the_crowd_was_one(exact_engines: list[Engine]) -> None:
    assert exact_engines[1].stats().preemptions > 0
    assert exact_engines[1].stats().counters.cached_prompt_tokens > 0
    for engine in exact_engines:
        engine.stop()


async def test_padding_steps_to_a_fixed_shape_changes_no_token(make_engine: MakeEngine) -> None:
    prompts = prompts_of((3, 40, 17))
    expected = [greedy_reference("qwen3", prompt, 20) for prompt in prompts]
    engine = make_engine("qwen3", batch_invariant=True, max_step_tokens=24, max_running=4)
    assert await all_tokens(engine, [request_for(prompt) for prompt in prompts]) == expected
    assert await tokens_of(engine, request_for(prompts[0])) == expected[0]
    if not engine.capacity.batch_invariant:
        assert any("batch_invariant does not hold" in note for note in engine.capacity.notes)
