"""A model that is held in 16 bits and computes in float32 gives the bits of the same model in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import collect, prompts_of, request_for, tiny_model
from torch import nn

from serve_app.core import SamplingParams, TokenBatch
from serve_app.engine.cpu import widen as widening
from serve_app.engine.cpu.library import Kernels
from serve_app.engine.cpu.linear import Form, PackedLinear
from serve_app.engine.cpu.widen import WideEmbedding, widen
from serve_app.engine.engine import Engine
from serve_app.engine.engine_error import EngineError

MakeEngine = Callable[..., Engine]
FORMS = {torch.bfloat16: Form.BFLOAT16, torch.float16: Form.FLOAT16}


def held(kind: str, dtype: torch.dtype) -> Any:
    """As the loader gives it: weights in 16 bits, and what no checkpoint has as a float32 model has it."""
    model, constants = tiny_model(kind).to(dtype), tiny_model(kind)
    for name, module in constants.named_modules():
        for key in module._non_persistent_buffers_set:
            model.get_submodule(name)._buffers[key] = module._buffers[key]
    return model


def rounded(kind: str, dtype: torch.dtype) -> Any:
    """The same weights in float32."""
    model = tiny_model(kind)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()
    return model


def fused(model: Any) -> dict[str, str]:
    """Which modules have forwards of ours."""
    return {
        name: type(vars(each)["forward"]).__name__ for name, each in model.named_modules() if "forward" in vars(each)
    }


async def logprobs(engine: Engine) -> list[Any]:
    sampling = SamplingParams(seed=5, logprobs=3)
    replies = await collect(engine, request_for(prompts_of([37])[0], 12, sampling=sampling))
    return [logprob for reply in replies if isinstance(reply, TokenBatch) for logprob in reply.logprobs or ()]


@pytest.mark.parametrize("dtype", FORMS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
async def test_the_same_bits(
    make_engine: MakeEngine, kernels: Kernels, kernel_folder: Path, kind: str, dtype: torch.dtype
) -> None:
    wide_model, narrow_model = rounded(kind, dtype), held(kind, dtype)
    wide = make_engine(model=wide_model, kernel_cache=kernel_folder)
    narrow = make_engine(model=narrow_model, dtype=torch.float32, kernel_cache=kernel_folder)
    assert narrow.capacity.batch_invariant
    assert narrow.capacity.numerics_id == wide.capacity.numerics_id
    assert await logprobs(narrow) == await logprobs(wide)
    forms = {module.form for module in narrow_model.modules() if isinstance(module, PackedLinear)}
    assert forms == {FORMS[dtype]}
    assert all(parameter.dtype == torch.float32 for parameter in narrow_model.parameters())
    assert fused(narrow_model) == fused(wide_model)


async def test_without_kernels_it_computes_in_float32_too(make_engine: MakeEngine) -> None:
    model = held("llama", torch.bfloat16)
    engine = make_engine(model=model, dtype=torch.float32, cpu_kernels=False)
    assert {layer.shape.dtype for layer in engine._core.runner.layers.values()} == {torch.float32}
    assert model.config.dtype == torch.float32
    assert len(await logprobs(engine)) == 12


async def test_a_model_of_16_bits_stays_so_unless_it_is_told(make_engine: MakeEngine, kernel_folder: Path) -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    engine = make_engine(model=model, kernel_cache=kernel_folder)
    assert {layer.shape.dtype for layer in engine._core.runner.layers.values()} == {torch.bfloat16}
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


def test_an_embedding_is_left_in_its_16_bits_and_gives_float32() -> None:
    model = held("llama", torch.bfloat16)
    table = model.get_input_embeddings().weight.detach().clone()
    widen(model)
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, WideEmbedding)
    assert embeddings._table.dtype == torch.bfloat16
    ids = torch.tensor([[5, 0, 99]])
    assert torch.equal(embeddings(ids), nn.functional.embedding(ids, table.float()))
    assert torch.equal(embeddings.weight, table.float())


def test_one_that_does_more_than_look_up_is_widened_itself() -> None:
    class Scaled(nn.Embedding):
        """As Gemma 3's."""

    model = held("llama", torch.bfloat16)
    scaled = Scaled(*model.get_input_embeddings().weight.shape, dtype=torch.bfloat16)
    model.set_input_embeddings(scaled)
    widen(model)
    assert model.get_input_embeddings() is scaled
    assert scaled.weight.dtype == torch.float32


def test_without_the_memory_it_says_what_to_do(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widening, "available_memory_bytes", lambda: 1000)
    with pytest.raises(EngineError, match=r"GB of memory are needed for weights in float32 .*C\+\+ compiler"):
        make_engine(model=held("llama", torch.bfloat16), dtype=torch.float32, cpu_kernels=False)
