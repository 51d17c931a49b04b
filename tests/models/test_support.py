from pathlib import Path
from typing import Any

import pytest
import transformers as tf
from model_builders import tiny_config

from serve_app.config import ModelConfig
from serve_app.models import hub
from serve_app.models.model_error import ModelError
from serve_app.models.planning import plan_replica
from serve_app.models.source import ModelFiles, SourceKind
from serve_app.models.support import built_in_class, check_architecture

SERVED = [
    tiny_config(),
    tf.MistralConfig(),
    tf.Qwen2Config(),
    tf.Qwen3Config(),
    tf.GemmaConfig(),
    tf.Gemma2Config(),
    tf.Gemma3TextConfig(),
    tf.GPT2Config(),
    tf.GPTNeoXConfig(),
    tf.PhiConfig(),
    tf.Phi3Config(),
    tf.MixtralConfig(),
    tf.OPTConfig(),
]
REFUSED: list[tuple[Any, str]] = [
    (tf.FalconConfig(), r"FalconForCausalLM .* AttentionInterface"),
    (tf.BloomConfig(), r"BloomForCausalLM .* AttentionInterface"),
    (tf.MptConfig(), r"MptForCausalLM .* AttentionInterface"),
    (tf.GPTJConfig(), r"GPTJForCausalLM .* AttentionInterface"),
    (tf.MambaConfig(), r"MambaForCausalLM .* recurrent state"),
    (tf.Mamba2Config(), r"Mamba2ForCausalLM .* recurrent state"),
    (tf.RwkvConfig(), r"RwkvForCausalLM .* recurrent state"),
    (tf.JambaConfig(), r"JambaForCausalLM .* recurrent state"),
    (tf.RecurrentGemmaConfig(), r"RecurrentGemmaForCausalLM .* recurrent state"),
    (tf.BartConfig(), r"BartForCausalLM .* encoder-decoder"),
    (tf.T5Config(), r"t5 .* encoder-decoder"),
    (tf.BertConfig(), r"BertLMHeadModel .* both directions"),
    (tf.CLIPConfig(), r"clip .* no causal language model"),
    (tf.Gemma3Config(), r"Gemma3ForConditionalGeneration .* images or sound"),
    (tf.Gemma4Config(), r"Gemma4ForConditionalGeneration .* images or sound"),
    (tf.Gemma4TextConfig(), r"Gemma4ForCausalLM .* heads differ in width between layers"),
    (tf.Dots3NoteTextConfig(), r"Dots3NoteForCausalLM .* type indexed_attention"),
    (tf.MusicgenConfig(), r"MusicgenForCausalLM .* encoder-decoder"),
    (tf.Llama4TextConfig(), r"Llama4ForCausalLM .* chunked_attention"),
    (tf.DeepseekV3Config(), r"DeepseekV3ForCausalLM .*latent attention"),
    (tf.Lfm2Config(layer_types=["conv"] * 32), r"Lfm2ForCausalLM .* type conv"),
]


def _check(config: Any) -> None:
    found = built_in_class(config)
    assert found is not None
    check_architecture(config, found)


@pytest.mark.parametrize("config", SERVED, ids=lambda config: config.model_type)
def test_served(config: Any) -> None:
    _check(config)


@pytest.mark.parametrize(("config", "said"), REFUSED, ids=[config.model_type for config, _ in REFUSED])
def test_refused_by_name(config: Any, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        _check(config)


def test_heads_that_differ_are_told_before_weights_are_fetched_and_in_a_plan(tmp_path: Path) -> None:
    tf.Gemma4TextConfig(architectures=["Gemma4ForCausalLM"]).save_pretrained(tmp_path)
    model = ModelConfig(source="google/gemma")
    with pytest.raises(ModelError, match="heads differ in width"):
        hub._check_before_weights(model, tmp_path)
    files = ModelFiles(tmp_path, tmp_path, "gemma", SourceKind.HUB)
    with pytest.raises(ModelError, match="heads differ in width"):
        plan_replica(files, model, has_gpu=False, kv_cache_bytes=100_000)


def test_remote_code_is_looked_at_once_it_is_loaded() -> None:
    class Own(tf.PretrainedConfig):
        model_type = "own"

    config = Own()
    config.auto_map = {"AutoModelForCausalLM": "modeling_own.Own"}
    assert built_in_class(config) is None
