import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from model_builders import ignore_progress, tiny_config, tiny_tokenizer
from safetensors.torch import load_file, save_file

from serve_app.config import ModelConfig
from serve_app.core import LoadStage
from serve_app.models import loader
from serve_app.models.loader import LoadedModel, choose_device, choose_dtype, load
from serve_app.models.model_error import ModelError
from serve_app.models.source import resolve


def _load(folder: Path, **settings: Any) -> LoadedModel:
    model = ModelConfig(source=str(folder), **settings)
    files = resolve(model, folder / "cache", progress=ignore_progress)
    return load(files, model, has_gpu=False, progress=ignore_progress)


def _save(model: tf.PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


IDS = torch.tensor([[5, 9, 200, 31, 7]])


def test_a_folder_as_it_was_saved(llama_folder: Path) -> None:
    stages: list[LoadStage] = []
    model = ModelConfig(source=str(llama_folder), max_model_len=32)
    files = resolve(model, llama_folder, progress=ignore_progress)
    loaded = load(files, model, has_gpu=False, progress=stages.append)
    assert [stage.stage.split(" (")[0] for stage in stages] == ["loading weights", "fingerprinting weights"]
    assert (loaded.name, loaded.context_tokens, loaded.notes) == ("tiny-llama", 32, ())
    assert (loaded.device.type, loaded.dtype) == ("cpu", torch.float32)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.model.config._attn_implementation == "sdpa"
    numbers = sum(parameter.numel() for parameter in loaded.model.parameters())
    assert 4 * numbers <= loaded.weights_bytes <= 4 * numbers + 1024  # and the rotary buffers
    torch.manual_seed(0)
    same = tf.LlamaForCausalLM(tiny_config()).eval()
    assert torch.equal(loaded.model(IDS).logits, same(IDS).logits)


def test_tied_weights_count_once(tmp_path: Path) -> None:
    tied = _load(_save(tf.LlamaForCausalLM(tiny_config(tie_word_embeddings=True)), tmp_path / "tied"))
    apart = _load(_save(tf.LlamaForCausalLM(tiny_config()), tmp_path / "apart"))
    assert apart.weights_bytes - tied.weights_bytes == 300 * 32 * 4


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("GPT2LMHeadModel", tf.GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
        (
            "Gemma2ForCausalLM",
            tf.Gemma2Config(
                vocab_size=300,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
            ),
        ),
    ],
)
def test_other_architectures(tmp_path: Path, architecture: str, config: Any) -> None:
    folder = _save(getattr(tf, architecture)(config), tmp_path / "m")
    assert type(_load(folder).model).__name__ == architecture


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype(llama_folder: Path, dtype: str) -> None:
    loaded = _load(llama_folder, dtype=dtype)
    assert loaded.dtype == loaded.model.dtype == getattr(torch, dtype)


def _narrowed(model: tf.PreTrainedModel, dtype: torch.dtype, folder: Path, wide: str = "") -> Path:
    """`model` saved in 16 bits, but for weights whose names contain `wide`."""
    model.to(dtype)
    _save(model, folder)
    if wide:
        file = folder / "model.safetensors"
        save_file({k: v.float() if wide in k else v for k, v in load_file(file).items()}, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["Llama", "Gemma3"])
def test_on_a_cpu_a_checkpoint_of_16_bits_is_held_so_and_is_the_same_model(
    tmp_path: Path, dtype: torch.dtype, architecture: str
) -> None:
    torch.manual_seed(0)
    if architecture == "Llama":
        model: tf.PreTrainedModel = tf.LlamaForCausalLM(tiny_config(rope_theta=12_345.0))
    else:  # its embeddings are scaled by a constant that is rounded to the dtype of the weights
        config = tf.Gemma3TextConfig(
            vocab_size=300,
            hidden_size=40,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
        )
        model = tf.Gemma3ForCausalLM(config)
    loaded = _load(_narrowed(model, dtype, tmp_path / "m"))
    assert loaded.dtype == torch.float32
    assert loaded.model.dtype == dtype
    exact = type(model).from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    assert loaded.weights_bytes < 0.6 * sum(4 * parameter.numel() for parameter in exact.parameters())
    others = dict(exact.named_buffers())
    assert others
    for name, buffer in loaded.model.named_buffers():
        assert torch.equal(buffer, others[name])
    assert torch.equal(loaded.in_full()(IDS).logits, exact(IDS).logits)


def test_one_that_is_not_in_16_bits_throughout_is_held_in_float32(tmp_path: Path) -> None:
    folder = _narrowed(tf.LlamaForCausalLM(tiny_config()), torch.bfloat16, tmp_path / "m", wide="norm")
    assert _load(folder).model.dtype == torch.float32


@pytest.mark.parametrize("raises", [True, False])
def test_a_model_whose_constants_need_weights_is_held_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raises: bool
) -> None:
    class Peculiar(tf.LlamaForCausalLM):
        """As code that comes with a model may be."""

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            without_weights = not self.model.rotary_emb.inv_freq.is_meta
            if without_weights and raises:
                raise RuntimeError("no weights")
            if without_weights:
                self.model.rotary_emb.inv_freq = self.model.rotary_emb.inv_freq.to("meta")

    folder = _narrowed(tf.LlamaForCausalLM(tiny_config()), torch.bfloat16, tmp_path / "m")
    exact = tf.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    monkeypatch.setitem(tf.AutoModelForCausalLM._model_mapping._extra_content, tf.LlamaConfig, Peculiar)
    model = _load(folder).model
    assert type(model) is Peculiar
    assert model.dtype == torch.float32
    assert torch.equal(model(IDS).logits, exact(IDS).logits)


@pytest.mark.parametrize("settings", [{"dtype": "float16"}, {"quantization": "bnb-int8"}])
def test_what_the_user_asks_for_is_done(tmp_path: Path, settings: dict[str, Any]) -> None:
    config = tiny_config(hidden_size=64, intermediate_size=128, head_dim=16)
    folder = _narrowed(tf.LlamaForCausalLM(config), torch.bfloat16, tmp_path / "m")
    loaded = _load(folder, **settings)
    assert loaded.dtype == getattr(torch, settings.get("dtype", "float32"))
    assert loaded.model.model.norm.weight.dtype == loaded.dtype


def test_dtype_auto() -> None:
    bf16 = tiny_config(dtype="bfloat16")
    assert choose_dtype(bf16, ModelConfig(), torch.device("cpu")) == "float32"
    assert choose_dtype(bf16, ModelConfig(), torch.device("cuda")) == "bfloat16"
    assert choose_dtype(tiny_config(), ModelConfig(), torch.device("cuda")) == "bfloat16"
    assert choose_dtype(bf16, ModelConfig(dtype="float16"), torch.device("cuda")) == "float16"


@pytest.mark.parametrize(("quantization", "worst"), [("bnb-int8", 0.02), ("bnb-nf4", 0.2), ("bnb-fp4", 0.3)])
def test_bitsandbytes_on_cpu_is_close(tmp_path: Path, quantization: str, worst: float) -> None:
    torch.manual_seed(0)
    config = tiny_config(hidden_size=64, intermediate_size=128, head_dim=16)
    folder = _save(tf.LlamaForCausalLM(config), tmp_path / "m")
    exact, quantised = _load(folder), _load(folder, quantization=quantization)
    assert quantised.weights_bytes < exact.weights_bytes
    assert quantised.fingerprint != exact.fingerprint
    with torch.inference_mode():
        expected, got = exact.model(IDS).logits, quantised.model(IDS).logits
    error = (got - expected).norm() / expected.norm()
    assert 0 < error < worst


def test_int8_threshold_is_passed_on(llama_folder: Path) -> None:
    loaded = _load(llama_folder, quantization="bnb-int8")
    assert loaded.model.config.quantization_config.llm_int8_threshold == 0.0


def test_pickles_when_allowed(llama_folder: Path) -> None:
    state = {k: v for path in llama_folder.glob("*.safetensors") for k, v in load_file(path).items()}
    expected = _load(llama_folder).model(IDS).logits
    for path in llama_folder.glob("model*"):
        path.unlink()
    torch.save(state, llama_folder / "pytorch_model.bin")
    assert torch.equal(_load(llama_folder, allow_pickle_weights=True).model(IDS).logits, expected)


@pytest.mark.parametrize("quantization", ["none", "bnb-int8", "bnb-nf4"])
def test_a_missing_tensor_is_never_left_at_random(llama_folder: Path, quantization: str) -> None:
    for path in llama_folder.glob("model-*.safetensors"):
        state = load_file(path)
        if state.pop("model.layers.1.mlp.up_proj.weight", None) is not None:
            save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks weights of the model, e\.g\. model\.layers\.1\.mlp\.up_proj"):
        _load(llama_folder, quantization=quantization)


def test_a_tensor_that_pickles_lack_is_never_left_at_random(llama_folder: Path) -> None:
    state = {k: v for path in llama_folder.glob("*.safetensors") for k, v in load_file(path).items()}
    for path in llama_folder.glob("model*"):
        path.unlink()
    del state["model.layers.0.self_attn.k_proj.weight"]
    torch.save(state, llama_folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"lacks weights of the model, e\.g\. model\.layers\.0\.self_attn\.k_proj"):
        _load(llama_folder, allow_pickle_weights=True)


@pytest.mark.parametrize("cut", [1, 5000, 10**9])
def test_a_pickle_that_is_cut_off_is_one_sentence(llama_folder: Path, cut: int) -> None:
    for path in llama_folder.glob("model*"):
        path.unlink()
    file = llama_folder / "pytorch_model.bin"
    torch.save(tf.LlamaForCausalLM(tiny_config()).state_dict(), file)
    data = file.read_bytes()
    file.write_bytes(data[: max(len(data) - cut, 0)])
    with pytest.raises(ModelError) as caught:
        _load(llama_folder, allow_pickle_weights=True)
    assert "tiny-llama can't be loaded" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bias_that_the_config_gives_no_place_is_never_left_out(tmp_path: Path) -> None:
    folder = _save(tf.LlamaForCausalLM(tiny_config(attention_bias=True)), tmp_path / "m")
    assert _load(folder).model.config.attention_bias
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_bias": False}))
    with pytest.raises(ModelError, match=r"does not use, e\.g\. model\.layers\.0\.self_attn\.k_proj\.bias"):
        _load(folder)


@pytest.mark.parametrize(
    "name",
    ["self_attn.q_norm.weight", "self_attn.sinks", "post_feedforward_layernorm.weight", "mlp.experts.0.up_proj.weight"],
)
def test_a_part_of_a_layer_that_the_config_gives_no_place_is_never_left_out(tmp_path: Path, name: str) -> None:
    folder = _save(tf.LlamaForCausalLM(tiny_config()), tmp_path / "m")
    file = folder / "model.safetensors"
    save_file({**load_file(file), f"model.layers.1.{name}": torch.ones(4)}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=rf"does not use, e\.g\. model\.layers\.1\.{re.escape(name)}"):
        _load(folder)


def test_a_layer_that_the_config_does_not_count_is_never_left_out(tmp_path: Path) -> None:
    folder = _save(tf.LlamaForCausalLM(tiny_config(num_hidden_layers=3)), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(ModelError, match=r"does not use, e\.g\. model\.layers\.2\.input_layernorm\.weight"):
        _load(folder)


def test_what_only_other_uses_need_may_lie_beside_the_weights(tmp_path: Path) -> None:
    folder = _save(tf.LlamaForCausalLM(tiny_config()), tmp_path / "m")
    file = folder / "model.safetensors"
    state, ahead = load_file(file), "model.layers.2"
    more = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.layers.0.self_attn.masked_bias": torch.ones(1),
        "model.layers.0.self_attn.k_scale": torch.ones(1),
        f"{ahead}.eh_proj.weight": torch.ones(2, 32),
        **{key.replace("model.layers.1", ahead): value.clone() for key, value in state.items() if "layers.1." in key},
        "score.weight": torch.ones(2, 32),
    }
    save_file({**state, **more}, file, {"format": "pt"})
    assert torch.equal(_load(folder).model.lm_head.weight, state["lm_head.weight"])


def test_weights_of_another_shape(llama_folder: Path) -> None:
    config = json.loads((llama_folder / "config.json").read_text())
    (llama_folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    with pytest.raises(ModelError) as caught:
        _load(llama_folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "brand-new"}, "this version of transformers doesn't know"),
        ({}, "this version of transformers doesn't know"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}, "set model.trust_remote_code: true"),
        ({"model_type": "llama", "hidden_size": "wide"}, "can't be loaded from"),
        ({"model_type": "bloom"}, "BloomForCausalLM"),
        ({"model_type": "t5"}, "encoder-decoder"),
        (
            {"model_type": "llama", "max_position_embeddings": 16},
            "max_model_len is 32 and the model's own context is 16",
        ),
    ],
)
def test_configs_that_cannot_be_served(llama_folder: Path, config: dict[str, Any], said: str) -> None:
    (llama_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=said) as caught:
        _load(llama_folder, max_model_len=32)
    assert "\n" not in str(caught.value)


def test_not_enough_memory_is_said_before_loading(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "available_memory_bytes", lambda: 1000)
    with pytest.raises(ModelError, match=r"tiny-llama needs .* main memory .* are free"):
        _load(llama_folder)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_no_gpu_where_one_is_asked_for() -> None:
    for model, has_gpu in ((ModelConfig(device="cuda"), False), (ModelConfig(), True)):
        with pytest.raises(ModelError, match="torch finds none"):
            choose_device(model, has_gpu=has_gpu)
    with pytest.raises(ModelError, match="this replica has none"):
        choose_device(ModelConfig(device_map="auto"), has_gpu=False)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux tells what is shared")
def test_weights_stay_mapped_and_are_held_once(tmp_path: Path) -> None:
    """32 MB of weights must not appear in this process's own (anonymous) memory."""
    folder = _save(tf.LlamaForCausalLM(tiny_config(vocab_size=125_000)), tmp_path / "m")
    _load(folder)  # what the first load allocates for good is not of interest

    def anonymous_bytes() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))

    before = anonymous_bytes()
    loaded = _load(folder)
    loaded.model(IDS)
    assert loaded.weights_bytes > 32_000_000
    assert anonymous_bytes() - before < 8_000_000


def test_an_adapter_that_would_be_put_on_top_is_refused(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers does it where peft is installed, and only there."""
    expected = _load(llama_folder)
    (llama_folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    monkeypatch.setattr(loader, "is_peft_available", lambda: False)
    assert _load(llama_folder).fingerprint == expected.fingerprint
    monkeypatch.setattr(loader, "is_peft_available", lambda: True)
    with pytest.raises(ModelError, match=r"holds an adapter beside the weights, .*adapter_config\.json"):
        _load(llama_folder)


def test_what_is_planned_for_and_fingerprinted_is_what_is_loaded(llama_folder: Path) -> None:
    """A single file beside an index, from a second save into the same folder: transformers loads the single one."""
    torch.manual_seed(1)
    other = _save(tf.LlamaForCausalLM(tiny_config()), llama_folder.parent / "other")
    alone = _load(other)
    for name in ("model.safetensors", "config.json"):
        (llama_folder / name).write_bytes((other / name).read_bytes())
    loaded = _load(llama_folder)
    assert torch.equal(loaded.model(IDS).logits, alone.model(IDS).logits)
    assert loaded.fingerprint == alone.fingerprint
