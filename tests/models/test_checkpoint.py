import json
from pathlib import Path

import pytest
import torch
from model_builders import tiny_config
from transformers import LlamaForCausalLM

from serve_app.models.checkpoint import check_model_folder, check_tokenizer_folder, tensors, weight_files
from serve_app.models.errors import ModelError


def _shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[1]


def test_a_whole_folder_passes(llama_folder: Path) -> None:
    check_model_folder(llama_folder, allow_pickle=False)
    check_tokenizer_folder(llama_folder)
    assert len(weight_files(llama_folder)) > 2


def test_headers_list_every_tensor(llama_folder: Path) -> None:
    listed = {entry.name: entry.shape for path in weight_files(llama_folder) for entry in tensors(path)}
    expected = {name: tuple(t.shape) for name, t in LlamaForCausalLM(tiny_config()).state_dict().items()}
    assert listed == expected


def test_missing_shard_is_named(llama_folder: Path) -> None:
    shard = _shard(llama_folder)
    shard.unlink()
    with pytest.raises(ModelError, match=f"lacks the shard {shard.name}"):
        check_model_folder(llama_folder, allow_pickle=False)


@pytest.mark.parametrize("cut", [1, 50, 10**9])
def test_truncated_shard_is_named(llama_folder: Path, cut: int) -> None:
    shard = _shard(llama_folder)
    data = shard.read_bytes()
    shard.write_bytes(data[: max(len(data) - cut, 0)])
    with pytest.raises(ModelError, match=rf"{shard.name} is (cut off or damaged|not a whole safetensors file)"):
        check_model_folder(llama_folder, allow_pickle=False)


@pytest.mark.parametrize("header", [b"[]", b"{broken", b'{"a": {"dtype": "F32"}}', b'{"a": 1}', b"\xff\xfe"])
def test_rubbish_header_is_named(llama_folder: Path, header: bytes) -> None:
    shard = _shard(llama_folder)
    shard.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        check_model_folder(llama_folder, allow_pickle=False)


def test_a_git_lfs_pointer_is_no_safetensors_file(llama_folder: Path) -> None:
    _shard(llama_folder).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 10\n")
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        check_model_folder(llama_folder, allow_pickle=False)


def test_pickle_only_is_refused_unless_allowed(llama_folder: Path) -> None:
    for path in llama_folder.glob("model*"):
        path.unlink()
    torch.save({}, llama_folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only pickle weights .*allow_pickle_weights"):
        check_model_folder(llama_folder, allow_pickle=False)
    check_model_folder(llama_folder, allow_pickle=True)


def test_safetensors_win_over_pickles(llama_folder: Path) -> None:
    (llama_folder / "pytorch_model.bin").write_bytes(b"never read")
    check_model_folder(llama_folder, allow_pickle=False)


def test_folders_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        check_model_folder(tmp_path, allow_pickle=False)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        check_model_folder(tmp_path, allow_pickle=False)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="not a JSON object"):
        check_model_folder(tmp_path, allow_pickle=False)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds no weights"):
        check_model_folder(tmp_path, allow_pickle=False)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="adapter only; merge it"):
        check_model_folder(tmp_path, allow_pickle=False)
    with pytest.raises(ModelError, match="holds no tokenizer"):
        check_tokenizer_folder(tmp_path)


def test_index_without_shards(llama_folder: Path) -> None:
    (llama_folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(ModelError, match="names no shards"):
        check_model_folder(llama_folder, allow_pickle=False)
