import shutil
from pathlib import Path

import pytest
import torch
import transformers as tf
from model_builders import ignore_progress, tiny_config, write_gguf
from transformers import LlamaForCausalLM

from serve_app.config import ModelConfig
from serve_app.models.cache import cache_directory
from serve_app.models.loader import choose_context
from serve_app.models.model_error import ModelError
from serve_app.models.planning import plan_replica
from serve_app.models.sizes import config_weights_bytes, kv_bytes_per_token, own_context_tokens, stored_weights_bytes
from serve_app.models.source import resolve


def test_weights_from_headers_and_from_the_config_agree_with_the_model(llama_folder: Path) -> None:
    numbers = sum(parameter.numel() for parameter in LlamaForCausalLM(tiny_config()).parameters())
    assert stored_weights_bytes(llama_folder, "float32") == numbers * 4
    assert stored_weights_bytes(llama_folder, "bfloat16") == numbers * 2
    assert config_weights_bytes(tiny_config(), "float32") == numbers * 4


def test_quantised_weights_keep_embeddings_and_norms(llama_folder: Path) -> None:
    kept = 2 * 300 * 32 + 5 * 32  # embeddings, head, norms
    linear = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 32 * 48 * 3)
    assert stored_weights_bytes(llama_folder, "bfloat16", "bnb-int8") == kept * 2 + linear
    assert stored_weights_bytes(llama_folder, "bfloat16", "bnb-nf4") == kept * 2 + linear * 9 // 16


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (tiny_config(), 2 * 2 * 8 * 2 * 4),
        (tiny_config(head_dim=16), 2 * 2 * 16 * 2 * 4),
        (tf.GPT2Config(n_layer=3, n_head=4, n_embd=32), 3 * 4 * 8 * 2 * 4),
        (tf.Gemma3TextConfig(num_hidden_layers=2, num_key_value_heads=1, head_dim=256), 2 * 256 * 2 * 4),
        (tf.GPTBigCodeConfig(n_layer=2, n_head=4, n_embd=32, multi_query=True), 2 * 8 * 2 * 4),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_kv_bytes_of_a_token(config: object, expected: int) -> None:
    assert kv_bytes_per_token(config, "float32") == expected
    assert kv_bytes_per_token(config, "float16") == expected // 2


def test_weights_of_16_bits_are_planned_as_such_on_a_cpu(llama_folder: Path, tmp_path: Path) -> None:
    folder, model = tmp_path / "narrow", ModelConfig(source=str(tmp_path / "narrow"))
    LlamaForCausalLM.from_pretrained(llama_folder, dtype=torch.bfloat16).save_pretrained(folder)
    for file in llama_folder.glob("token*"):
        shutil.copy(file, folder)
    files = resolve(model, tmp_path, progress=ignore_progress)
    plan = plan_replica(files, model, has_gpu=False, kv_cache_bytes=100_000)
    assert plan.weights_bytes == stored_weights_bytes(llama_folder, "float32") / 2
    assert plan.kv_bytes_per_token == 256, "it computes in float32"
    (folder / "model.safetensors").unlink()
    assert plan_replica(files, model, has_gpu=False, kv_cache_bytes=100_000) == plan


def test_plan_of_a_replica(llama_folder: Path, tmp_path: Path) -> None:
    model = ModelConfig(source=str(llama_folder), max_model_len=50)
    files = resolve(model, tmp_path, progress=ignore_progress)
    plan = plan_replica(files, model, has_gpu=False, kv_cache_bytes=100_000)
    assert plan.kv_bytes_per_token == 256
    assert plan.kv_capacity_tokens == 390
    assert plan.context_tokens == 50
    assert plan.total_bytes == stored_weights_bytes(llama_folder, "float32") + 100_000

    for path in llama_folder.glob("model*"):  # as an ingress, or `check` before anything is fetched, finds it
        path.unlink()
    assert plan_replica(files, model, has_gpu=False, kv_cache_bytes=100_000) == plan

    too_long = ModelConfig(source=str(llama_folder), max_model_len=65)
    with pytest.raises(ModelError, match="max_model_len is 65 and the model's own context is 64"):
        plan_replica(files, too_long, has_gpu=False, kv_cache_bytes=1)


@pytest.mark.usefixtures("converts_here")
def test_plan_of_a_gguf_file_before_it_is_converted(tmp_path: Path) -> None:
    model = ModelConfig(source=str(write_gguf(tmp_path / "tiny.gguf")))
    before = plan_replica(None, model, has_gpu=False, kv_cache_bytes=100_000)
    files = resolve(model, tmp_path / "cache", progress=ignore_progress)
    assert plan_replica(files, model, has_gpu=False, kv_cache_bytes=100_000) == before


def test_a_file_that_is_no_gguf_has_no_plan(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("no weights")
    with pytest.raises(ModelError, match=r"text\.gguf can't be converted: it is cut off or no GGUF file"):
        plan_replica(None, ModelConfig(source=str(tmp_path / "text.gguf")), has_gpu=False, kv_cache_bytes=1)


@pytest.mark.demo
def test_the_demo_models_plan_is_known_before_it_is_fetched() -> None:
    files = resolve(ModelConfig(), cache_directory(), progress=ignore_progress)
    planned = plan_replica(None, ModelConfig(), has_gpu=False, kv_cache_bytes=100_000)
    assert plan_replica(files, ModelConfig(), has_gpu=False, kv_cache_bytes=100_000) == planned


@pytest.mark.parametrize(
    ("stated", "rope", "expected"),
    [
        (64, {"rope_type": "yarn", "factor": 4.0}, 256),
        (64, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        (256, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        (80, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),  # as Qwen3's
        (64, {"rope_type": "linear", "factor": 4.0}, 64),
        (64, {"rope_type": "dynamic", "factor": 4.0}, 64),
        (64, {"rope_type": "default"}, 64),
    ],
)
def test_yarn_stretches_the_context_by_its_factor(stated: int, rope: dict[str, object], expected: int) -> None:
    config = tiny_config(max_position_embeddings=stated, rope_parameters={"rope_theta": 10_000.0, **rope})
    assert own_context_tokens(config) == expected
    assert choose_context(config, ModelConfig(max_model_len=expected)) == expected
    with pytest.raises(ModelError, match=f"the model's own context is {expected}"):
        choose_context(config, ModelConfig(max_model_len=expected + 1))
