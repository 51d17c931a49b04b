import json
from pathlib import Path

import pytest
import torch
from model_builders import tiny_config
from safetensors.torch import save_file
from transformers import LlamaForCausalLM
from transformers.distributed.checkpoint import is_sharded_checkpoint
from transformers.modeling_utils import _get_resolved_checkpoint_files

from serve_app.models.checkpoint import (
    PICKLE_WEIGHTS,
    SAFETENSORS_WEIGHTS,
    check_model_folder,
    check_tokenizer_folder,
    is_pickle,
    tensors,
    weight_files,
)
from serve_app.models.model_error import ModelError


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


def _beside(folder: Path) -> None:
    """Whatever may lie in a model's folder: each could be taken for the weights."""
    single = {"weight": torch.zeros(2)}
    (folder / "original").mkdir()
    for name in (
        "model.safetensors",
        "consolidated.safetensors",
        "adapter_model.safetensors",
        "original/a.safetensors",
    ):
        save_file(single, folder / name)
    for name in ("pytorch_model.bin", "training_args.bin", "consolidated.00.pth"):
        torch.save(single, folder / name)
    index = {"metadata": {}, "weight_map": {"weight": "pytorch_model-1.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    torch.save(single, folder / "pytorch_model-1.bin")
    (folder / "model.gguf").write_bytes(b"GGUF")


def test_the_files_that_are_described_are_those_that_transformers_loads(llama_folder: Path) -> None:
    """With everything in the folder, and then with one file less of those that were taken, until none is left."""
    _beside(llama_folder)
    for entry in (*SAFETENSORS_WEIGHTS, *PICKLE_WEIGHTS):
        described = weight_files(llama_folder)
        loaded, _ = _get_resolved_checkpoint_files(
            str(llama_folder), None, None, not is_pickle(described), {}, is_remote_code=False
        )
        assert [str(path) for path in described] == loaded
        (llama_folder / entry).unlink()
    assert weight_files(llama_folder) == []


def test_the_file_that_a_config_names_is_the_one(llama_folder: Path) -> None:
    _beside(llama_folder)
    config = json.loads((llama_folder / "config.json").read_text())
    for named in ("consolidated.safetensors", "model.safetensors.index.json"):
        (llama_folder / "config.json").write_text(json.dumps({**config, "transformers_weights": named}))
        loaded, _ = _get_resolved_checkpoint_files(
            str(llama_folder), None, None, True, {}, is_remote_code=False, transformers_explicit_filename=named
        )
        assert [str(path) for path in weight_files(llama_folder)] == loaded
    for named in ("other.safetensors", "pytorch_model.bin", "../model.safetensors"):
        (llama_folder / "config.json").write_text(json.dumps({**config, "transformers_weights": named}))
        with pytest.raises(ModelError, match="transformers_weights"):
            weight_files(llama_folder)


def test_shards_outside_of_the_folder(llama_folder: Path) -> None:
    (llama_folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../b.safetensors"}}))
    with pytest.raises(ModelError, match="names shards outside of its folder"):
        weight_files(llama_folder)


def test_a_distributed_checkpoint_is_not_loaded_in_place_of_what_is_described(llama_folder: Path) -> None:
    (llama_folder / "shard-00000-model-00001-of-00001.safetensors").write_bytes(b"")
    assert is_sharded_checkpoint(llama_folder)
    with pytest.raises(ModelError, match="holds a distributed checkpoint"):
        check_model_folder(llama_folder, allow_pickle=False)


def test_index_without_shards(llama_folder: Path) -> None:
    (llama_folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(ModelError, match="names no shards"):
        check_model_folder(llama_folder, allow_pickle=False)
