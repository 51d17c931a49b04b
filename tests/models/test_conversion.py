import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from model_builders import ignore_progress, write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from serve_app.config import ModelConfig
from serve_app.core import LoadStage
from serve_app.models.conversion import CONVERSION_VERSION, convert, convert_here
from serve_app.models.defaults import read_generation_defaults
from serve_app.models.model_error import ModelError
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


@pytest.mark.usefixtures("converts_here")
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
    assert convert_here(gguf, tmp_path / "out", ignore_progress) == ()
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


@pytest.mark.usefixtures("converts_here")
def test_a_tensor_that_lacks_is_named_and_never_left_at_random(tmp_path: Path) -> None:
    gguf = write_gguf(tmp_path / "cut.gguf", without="blk.1.ffn_up.weight")
    with pytest.raises(ModelError, match=r"cut\.gguf lacks 1 of the model's tensors, e\.g\. blk\.1\.ffn_up\.weight"):
        resolve(ModelConfig(source=str(gguf)), tmp_path / "cache", progress=ignore_progress)


@pytest.mark.usefixtures("converts_here")
def test_a_tensor_without_a_place_is_named_and_never_left_out(tmp_path: Path) -> None:
    """A Llama with biases, which transformers' reader drops."""
    gguf = write_gguf(tmp_path / "odd.gguf", more={"blk.0.attn_q.bias": np.ones(32, np.float32)})
    with pytest.raises(ModelError, match=r"LlamaForCausalLM does not use, e\.g\. blk\.0\.attn_q\.bias"):
        resolve(ModelConfig(source=str(gguf)), tmp_path / "cache", progress=ignore_progress)


@pytest.mark.usefixtures("converts_here")
@pytest.mark.parametrize("cut", [1, 2048, 100_000])
def test_a_cut_download_is_named(tmp_path: Path, cut: int) -> None:
    gguf = write_gguf(tmp_path / "cut.gguf")
    gguf.write_bytes(gguf.read_bytes()[:-cut])
    with pytest.raises(ModelError, match=r"^cut\.gguf can't be converted: it is cut off") as caught:
        resolve(ModelConfig(source=str(gguf)), tmp_path / "cache", progress=ignore_progress)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("converts_here")
@pytest.mark.parametrize("given", [0, 2])
def test_a_model_in_parts_is_converted_whole(tmp_path: Path, given: int) -> None:
    """Whichever part is given."""
    whole = resolve(
        ModelConfig(source=str(write_gguf(tmp_path / "whole.gguf"))), tmp_path / "cache", progress=ignore_progress
    )
    first = write_gguf(tmp_path / "apart.gguf", tensors_a_part=8)
    parts = sorted(tmp_path.glob("apart-*.gguf"))
    assert first == parts[0]
    assert len(parts) == 3
    files = resolve(ModelConfig(source=str(parts[given])), tmp_path / "cache", progress=ignore_progress)
    assert files.name == "apart"
    assert sorted(path.name for path in files.folder.iterdir()) == sorted(p.name for p in whole.folder.iterdir())
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
        assert (files.folder / name).read_bytes() == (whole.folder / name).read_bytes()


@pytest.mark.usefixtures("converts_here")
def test_a_part_that_lacks_is_named(tmp_path: Path) -> None:
    first = write_gguf(tmp_path / "apart.gguf", tensors_a_part=8)
    last = tmp_path / "apart-00003-of-00003.gguf"
    last.unlink()
    with pytest.raises(ModelError, match=f"lacks {last.name} of the 3 parts of apart"):
        resolve(ModelConfig(source=str(first)), tmp_path / "cache", progress=ignore_progress)


@pytest.mark.usefixtures("converts_here")
def test_a_part_under_another_name_is_known(tmp_path: Path) -> None:
    first = write_gguf(tmp_path / "apart.gguf", tensors_a_part=8)
    alone = first.rename(tmp_path / "model.gguf")
    with pytest.raises(ModelError, match=r"model\.gguf says that it is part 1 of 3"):
        resolve(ModelConfig(source=str(alone)), tmp_path / "cache", progress=ignore_progress)


@pytest.mark.usefixtures("converts_here")
def test_a_part_of_another_model_is_known(tmp_path: Path) -> None:
    first = write_gguf(tmp_path / "apart.gguf", tensors_a_part=8)
    (tmp_path / "apart-00002-of-00003.gguf").write_bytes((tmp_path / "apart-00003-of-00003.gguf").read_bytes())
    with pytest.raises(ModelError, match=r"apart-00002-of-00003\.gguf says that it is part 3 of 3"):
        resolve(ModelConfig(source=str(first)), tmp_path / "cache", progress=ignore_progress)


@pytest.mark.usefixtures("converts_here")
def test_a_conversion_by_an_older_recipe_is_not_trusted(tmp_path: Path) -> None:
    """The first recipe took files that lack tensors."""
    gguf = write_gguf(tmp_path / "tiny.gguf")
    files = resolve(ModelConfig(source=str(gguf)), tmp_path / "cache", progress=ignore_progress)
    manifest = files.folder / "serve_app.json"
    manifest.write_text(manifest.read_text().replace(f"/{CONVERSION_VERSION}", "/1"))
    stages: list[LoadStage] = []
    assert resolve(ModelConfig(source=str(gguf)), tmp_path / "cache", progress=stages.append) == files
    assert any("converting" in stage.stage for stage in stages)
