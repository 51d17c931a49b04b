import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from gguf import GGUFWriter, RopeScalingType
from model_builders import ignore_progress, write_gguf
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from serve_app.config import ModelConfig
from serve_app.models.defaults import read_generation_defaults
from serve_app.models.gguf_files import read_gguf
from serve_app.models.gguf_settings import gguf_config
from serve_app.models.loader import load
from serve_app.models.model_error import ModelError
from serve_app.models.planning import plan_replica
from serve_app.models.sizes import MemoryPlan
from serve_app.models.source import resolve

Settings = Callable[[GGUFWriter], None]


def _carried(gguf: Path) -> Any:
    return gguf_config(gguf, read_gguf([gguf]))


def _angles(config: Any) -> torch.Tensor:
    return LlamaRotaryEmbedding(config).inv_freq


def _llama(**rope: Any) -> tf.LlamaConfig:
    """What the file of `write_gguf` is, in transformers' own words."""
    return tf.LlamaConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_parameters={"rope_theta": 100_000.0, **rope},
    )


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _llama3_divisors(factor: float, base: float, width: int) -> np.ndarray[Any, Any]:
    """As convert_hf_to_gguf.py of llama.cpp writes them for Llama 3.1 and later."""
    divisors = []
    for frequency in 1.0 / (base ** (np.arange(0, width, 2, dtype=np.float32) / width)):
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


@pytest.mark.usefixtures("converts_here")
def test_llama_3s_frequencies_make_the_model_that_its_own_config_makes(tmp_path: Path) -> None:
    divisors = _llama3_divisors(32.0, 500_000.0, 8)
    assert 1 < divisors[2] < 32 == divisors[3]
    gguf = write_gguf(
        tmp_path / "l3.gguf",
        more={"rope_freqs.weight": divisors},
        settings=lambda writer: writer.add_rope_freq_base(500_000.0),
    )
    model = ModelConfig(source=str(gguf))
    files = resolve(model, tmp_path / "cache", progress=ignore_progress)
    loaded = load(files, model, has_gpu=False, progress=ignore_progress).model
    own = tf.LlamaForCausalLM.from_pretrained(files.folder, rope_parameters=dict(LLAMA3)).eval()
    assert loaded.config.rope_parameters == own.config.rope_parameters == LLAMA3
    ids = torch.arange(60)[None]
    assert torch.equal(loaded(ids).logits, own(ids).logits)
    usual = _angles(_llama(rope_type="default", rope_theta=500_000.0))
    assert not torch.allclose(loaded.model.rotary_emb.inv_freq, usual)  # the file's numbers make a difference


def test_frequencies_of_no_known_kind_are_divided_all_the_same(tmp_path: Path) -> None:
    divisors = np.array([1.0, 1.5, 3.0, 7.0], np.float32)
    config = _carried(write_gguf(tmp_path / "m.gguf", more={"rope_freqs.weight": divisors}))
    rotary = LlamaRotaryEmbedding(config)
    torch.testing.assert_close(rotary.inv_freq, _angles(_llama(rope_type="default")) / torch.from_numpy(divisors))
    assert rotary.attention_scaling == 1.0


def _linear(writer: GGUFWriter) -> None:
    writer.add_rope_scaling_type(RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)


def _yarn(writer: GGUFWriter) -> None:
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(2.5)
    writer.add_rope_scaling_orig_ctx_len(24)


@pytest.mark.parametrize(
    ("settings", "own"),
    [
        (_linear, {"rope_type": "linear", "factor": 4.0}),
        (_yarn, {"rope_type": "yarn", "factor": 2.5, "original_max_position_embeddings": 24}),
        (lambda writer: writer.add_rope_scaling_type(RopeScalingType.NONE), {"rope_type": "default"}),
        (lambda writer: writer.add_float32("llama.rope.scale_linear", 4.0), {"rope_type": "linear", "factor": 4.0}),
    ],
)
def test_scaling_is_what_transformers_calls_it(tmp_path: Path, settings: Settings, own: dict[str, Any]) -> None:
    config = _carried(write_gguf(tmp_path / "m.gguf", settings=settings))
    assert torch.equal(_angles(config), _angles(_llama(**own)))
    assert LlamaRotaryEmbedding(config).attention_scaling == LlamaRotaryEmbedding(_llama(**own)).attention_scaling


def test_longrope_of_phi_3(tmp_path: Path) -> None:
    def settings(writer: GGUFWriter) -> None:
        writer.add_rope_scaling_orig_ctx_len(32)
        writer.add_rope_scaling_attn_factors(1.25)
        writer.add_sliding_window(20)

    short, long = np.full(4, 1.5, np.float32), np.full(4, 3.0, np.float32)
    more = {"rope_factors_short.weight": short, "rope_factors_long.weight": long}
    config = _carried(write_gguf(tmp_path / "m.gguf", architecture="phi3", more=more, settings=settings))
    rope = config.rope_parameters
    assert (rope["rope_type"], rope["attention_factor"]) == ("longrope", 1.25)
    assert (rope["short_factor"], rope["long_factor"]) == ([1.5] * 4, [3.0] * 4)
    assert config.original_max_position_embeddings == rope["original_max_position_embeddings"] == 32
    assert config.sliding_window == 20


def test_gemma_3_scales_the_layers_without_a_window(tmp_path: Path) -> None:
    def settings(writer: GGUFWriter) -> None:
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(8.0)
        writer.add_rope_freq_base_swa(20_000.0)
        writer.add_sliding_window_pattern(2)
        writer.add_sliding_window(16)
        writer.add_key_length(16)
        writer.add_value_length(16)
        writer.add_rope_dimension_count(16)

    config = _carried(write_gguf(tmp_path / "m.gguf", architecture="gemma3", settings=settings))
    assert config.rope_parameters["full_attention"] == {"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0}
    assert config.rope_parameters["sliding_attention"] == {"rope_type": "default", "rope_theta": 2e4}
    assert config.layer_types == ["sliding_attention", "full_attention"]
    assert (config.head_dim, config.query_pre_attn_scalar, config.sliding_window) == (16, 16, 16)


def test_gemma_2s_largest_scales_its_queries_by_width_over_heads(tmp_path: Path) -> None:
    def settings(writer: GGUFWriter) -> None:
        writer.add_block_count(46)
        writer.add_key_length(16)
        writer.add_rope_dimension_count(16)
        writer.add_final_logit_softcapping(25.0)

    config = _carried(write_gguf(tmp_path / "m.gguf", architecture="gemma2", settings=settings))
    assert (config.query_pre_attn_scalar, config.final_logit_softcapping) == (8, 25.0)


def test_what_another_table_of_transformers_leaves_out_is_carried(tmp_path: Path) -> None:
    def settings(writer: GGUFWriter) -> None:
        writer.add_layer_norm_eps(1e-4)
        writer.add_rope_dimension_count(4)

    config = _carried(write_gguf(tmp_path / "m.gguf", architecture="stablelm", settings=settings))
    assert config.layer_norm_eps == 1e-4
    assert config.rope_parameters["partial_rotary_factor"] == 0.5
    assert config.rope_parameters["rope_theta"] == 1e5


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (lambda writer: writer.add_logit_scale(0.5), r"logit_scale to 0\.5"),
        (lambda writer: writer.add_residual_scale(0.2), "residual_scale"),
        (lambda writer: writer.add_attention_scale(0.25), r"attention\.scale to 0\.25"),
        (lambda writer: writer.add_final_logit_softcapping(30.0), r"final_logit_softcapping to 30\.0"),
        (lambda writer: writer.add_sliding_window(32), r"attention\.sliding_window to 32"),
        (lambda writer: writer.add_rope_dimension_count(4) or writer.add_key_length(8), r"rope\.dimension_count to 4"),
        (lambda writer: writer.add_value_length(16), r"attention\.value_length to 16"),
        (lambda writer: writer.add_rope_scaling_type(RopeScalingType.LONGROPE), r"rope\.scaling\.type to 'longrope'"),
        (lambda writer: _yarn(writer) or writer.add_rope_scaling_yarn_log_mul(0.1), r"rope\.scaling\.yarn_log_mul"),
        (lambda writer: writer.add_causal_attention(False), r"attention\.causal to False"),
        (lambda writer: writer.add_expert_count(8), "expert_count to 8"),
        (lambda writer: writer.add_uint32("llama.brand_new", 7), "brand_new to 7"),
    ],
)
def test_what_has_no_place_is_refused_by_name(tmp_path: Path, settings: Settings, said: str) -> None:
    with pytest.raises(ModelError, match=rf"m\.gguf sets {said}"):
        _carried(write_gguf(tmp_path / "m.gguf", settings=settings))


def _sampling(writer: GGUFWriter) -> None:
    writer.add_sampling_temp(0.6)
    writer.add_sampling_top_k(20)
    writer.add_logit_scale(1.0)
    writer.add_attention_scale(8**-0.5)
    writer.add_causal_attention(True)


@pytest.mark.usefixtures("converts_here")
def test_what_changes_nothing_passes_and_sampling_defaults_are_the_files(tmp_path: Path) -> None:
    model = ModelConfig(source=str(write_gguf(tmp_path / "m.gguf", settings=_sampling)))
    files = resolve(model, tmp_path / "cache", progress=ignore_progress)
    defaults = read_generation_defaults(files.folder, files.tokenizer_folder)
    assert (defaults.temperature, defaults.top_k, defaults.top_p) == (0.6, 20, 1.0)


def test_a_check_before_the_conversion_refuses_too_and_counts_the_same(tmp_path: Path) -> None:
    def plan(gguf: Path) -> MemoryPlan:
        return plan_replica(None, ModelConfig(source=str(gguf)), has_gpu=False, kv_cache_bytes=1000)

    whole = plan(write_gguf(tmp_path / "whole.gguf", settings=_yarn))
    assert whole.context_tokens == 64  # as stated: 24 x 2.5 is less
    assert plan(write_gguf(tmp_path / "apart.gguf", settings=_yarn, tensors_a_part=8)) == whole
    with pytest.raises(ModelError, match="logit_scale"):
        plan(write_gguf(tmp_path / "odd.gguf", settings=lambda writer: writer.add_logit_scale(0.5)))
