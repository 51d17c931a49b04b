"""Each kind of quantised weights through the engine, and what is said and held of them."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from model_builders import ignore_progress, tiny_config, tiny_tokenizer
from tiny_models import FINGERPRINT, all_tokens, request_for, tokens_of

from serve_app.config import EngineConfig, ModelConfig
from serve_app.engine.cpu.linear import PackedLinear
from serve_app.engine.engine import Engine
from serve_app.models import int8_linear
from serve_app.models.int8_linear import Int8Linear
from serve_app.models.loader import LoadedModel, load
from serve_app.models.sizes import stored_weights_bytes
from serve_app.models.source import resolve

KINDS = ("bnb-int8", "bnb-nf4", "bnb-fp4")
ON_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
UNLESS_FLOAT32 = "unless the checkpoint is float32 to the last bit"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Llama whose layers are as wide as bitsandbytes' blocks."""
    torch.manual_seed(0)
    config = tiny_config(hidden_size=64, intermediate_size=128, head_dim=16)
    return _save(tf.LlamaForCausalLM(config), tmp_path / "m")


def _save(model: tf.PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def _load(folder: Path, **settings: Any) -> LoadedModel:
    model = ModelConfig(source=str(folder), **settings)
    files = resolve(model, folder / "cache", progress=ignore_progress)
    return load(files, model, has_gpu=False, progress=ignore_progress)


@pytest.mark.parametrize("kind", KINDS)
async def test_the_engine_serves_it_and_a_neighbour_changes_nothing(kind: str, folder: Path) -> None:
    loaded = _load(folder, quantization=kind)
    config = EngineConfig(kv_cache_memory=2**22, threads=1)
    engine = Engine(loaded.model, config, context_tokens=64, fingerprint=FINGERPRINT)
    try:
        assert engine.capacity.notes == (), "no kernel is refused because of what the weights round"
        prompts = [[5, 9, 200, 31, 7], [8] * 20, [3, 4]]
        requests = [request_for(prompt, 12) for prompt in prompts]
        alone = [await tokens_of(engine, request) for request in requests]
        assert await all_tokens(engine, requests) == alone
    finally:
        await asyncio.to_thread(engine.stop)


@pytest.mark.skipif(not ON_AVX512, reason="elsewhere bitsandbytes computes")
async def test_8_bit_is_exact_with_our_kernels(folder: Path, kernel_folder: Path) -> None:
    loaded = _load(folder, quantization="bnb-int8")
    config = EngineConfig(kv_cache_memory=2**22, threads=2)
    engine = Engine(loaded.model, config, context_tokens=64, fingerprint=FINGERPRINT, kernel_cache=kernel_folder)
    try:
        if engine.capacity.notes:
            pytest.skip(engine.capacity.notes[0])  # no compiler
        assert engine.capacity.attention_backend == "cpu"
        assert engine.capacity.batch_invariant
        kinds = [type(module) for module in loaded.model.modules()]
        assert kinds.count(Int8Linear) == 2 * 7, "packing leaves quantised layers alone"
        assert kinds.count(PackedLinear) == 1, "and takes the output head"
    finally:
        await asyncio.to_thread(engine.stop)


@pytest.mark.skipif(not ON_AVX512, reason="elsewhere bitsandbytes computes")
def test_8_bit_layers_are_ours_where_the_processor_is_fast_at_them(folder: Path) -> None:
    loaded = _load(folder, quantization="bnb-int8")
    kinds = [type(module) for module in loaded.model.modules() if "Linear" in type(module).__name__]
    assert kinds.count(Int8Linear) == 2 * 7
    assert Linear8bitLt not in kinds
    assert UNLESS_FLOAT32 in loaded.notes[0], "weights that were smaller before are read as such with none"
    with_outliers = _load(folder, quantization="bnb-int8", llm_int8_threshold=6.0)
    assert any(isinstance(module, Linear8bitLt) for module in with_outliers.model.modules())
    assert "slower" in with_outliers.notes[0]
    assert UNLESS_FLOAT32 not in with_outliers.notes[0]


def test_ours_say_what_bitsandbytes_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = _load(folder, quantization="bnb-int8").model
    monkeypatch.setattr(int8_linear, "_product_is_exact", lambda: False)
    theirs = _load(folder, quantization="bnb-int8").model
    assert any(isinstance(module, Linear8bitLt) for module in theirs.modules())
    ids = torch.tensor([[5, 9, 200, 31, 7]])
    with torch.inference_mode():
        difference = (ours(ids).logits - theirs(ids).logits).norm() / theirs(ids).logits.norm()
    assert difference < 5e-3, "float16 instead of float32 between the layers, no more"


def test_a_slow_kind_is_said_at_load(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_linear, "_product_is_exact", lambda: False)
    assert "bnb-int8 saves memory on this CPU and costs speed" in _load(folder, quantization="bnb-int8").notes[0]
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    assert "bnb-nf4 saves memory on this CPU and costs speed" in _load(folder, quantization="bnb-nf4").notes[0]
    assert _load(folder).notes == ()


def test_layers_of_odd_shapes_are_kept_from_a_kernel_that_cannot_take_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = _save(tf.LlamaForCausalLM(tiny_config(hidden_size=48, intermediate_size=72, head_dim=12)), tmp_path / "m")
    loaded = _load(folder, quantization="bnb-nf4")
    assert not any(m.support_avx512bf16_for_cpu for m in loaded.model.modules() if isinstance(m, Linear4bit))
    with torch.inference_mode():
        assert loaded.model(torch.tensor([[5, 9, 200, 31, 7]])).logits.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_held_is_what_was_predicted(kind: str, folder: Path) -> None:
    loaded = _load(folder, quantization=kind)
    predicted = stored_weights_bytes(folder, "float32", kind)
    scales = 4 * sum(m.out_features for m in loaded.model.modules() if isinstance(m, Int8Linear | Linear8bitLt))
    assert predicted <= loaded.weights_bytes <= predicted + scales + 1024  # and the rotary buffers


def test_no_line_is_logged_for_each_layer(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        loaded = _load(folder, quantization="bnb-int8", llm_int8_threshold=6.0)
        loaded.model(torch.tensor([[5, 9]]))
    assert "MatMul8bitLt" not in caplog.text
