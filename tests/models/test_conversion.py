import json
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from model_builders import ignore_progress, write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from serve_app.config import ModelConfig
from serve_app.messages import LoadStage
from serve_app.models.conversion import convert
from serve_app.models.defaults import read_generation_defaults
from serve_app.models.errors import ModelError
from serve_app.models.source import SourceKind, resolve


def test_the_converted_folder_holds_the_files_numbers(tmp_path: Path) -> None:
    gguf = write_gguf(tmp_path / "tiny.gguf")
    folder = tmp_path / "out"
    folder.mkdir()
    stages: list[LoadStage] = []
    assert convert(gguf, folder, stages.append) == ()
    assert [stage.fraction for stage in stages if stage.fraction is not None] == [0.0, 0.9]

    config = json.loads((folder / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5
    assert config["architectures"] == ["LlamaForCausalLM"]
    model = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
    assert model.dtype == torch.float32
    stored = {tensor.name: tensor.data for tensor in GGUFReader(gguf).tensors}
    assert model.model.embed_tokens.weight.numpy().tobytes() == stored["token_embd.weight"].tobytes()
    assert model.model.layers[1].mlp.down_proj.weight.numpy().tobytes() == stored["blk.1.ffn_down.weight"].tobytes()

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.model_max_length == 64
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("hi\n\n12")) == ["hi", "ĊĊ", "1", "2"]
    assert tokenizer.apply_chat_template([{"content": "hi"}], tokenize=False) == "hi"
    assert read_generation_defaults(folder, folder).eos_token_ids == (0, 2)  # end of text, and end of turn


def test_a_pre_tokenizer_that_is_not_known_is_said(tmp_path: Path) -> None:
    gguf = write_gguf(tmp_path / "odd.gguf", pre="brand-new")
    files = resolve(ModelConfig(source=str(gguf)), tmp_path / "cache", progress=ignore_progress)
    assert (files.kind, files.name) == (SourceKind.GGUF, "odd")
    assert len(files.notes) == 1
    assert "'brand-new' is not known" in files.notes[0]
    gguf.touch()
    again = resolve(ModelConfig(source=str(gguf)), tmp_path / "cache", progress=ignore_progress)
    assert again == files


def test_gpt2s_own_splitting_needs_no_note(tmp_path: Path) -> None:
    gguf = write_gguf(tmp_path / "plain.gguf", pre="gpt-2")
    (tmp_path / "out").mkdir()
    assert convert(gguf, tmp_path / "out", ignore_progress) == ()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("hi\n\n12")) == ["hi", "Ċ", "Ċ", "12"]


@pytest.mark.parametrize("content", [b"", b"GGUF", b"rubbish" * 100])
def test_rubbish_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    gguf = tmp_path / "bad.gguf"
    gguf.write_bytes(content)
    with pytest.raises(ModelError, match=r"^bad\.gguf can't be converted: ") as caught:
        resolve(ModelConfig(source=str(gguf)), tmp_path / "cache", progress=ignore_progress)
    assert "\n" not in str(caught.value)


def test_architecture_that_transformers_cannot_read(tmp_path: Path) -> None:
    gguf = write_gguf(tmp_path / "new.gguf", architecture="rwkv7")
    with pytest.raises(ModelError, match=r"^new\.gguf can't be converted: .*rwkv7"):
        resolve(ModelConfig(source=str(gguf)), tmp_path / "cache", progress=ignore_progress)
