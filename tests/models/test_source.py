import shutil
from pathlib import Path

import pytest
from model_builders import ignore_progress

from serve_app.config import ModelConfig
from serve_app.models.model_error import ModelError
from serve_app.models.source import SourceKind, aliases, resolve, source_kind


def test_kinds(tmp_path: Path) -> None:
    (tmp_path / "m.GGUF").write_bytes(b"")
    assert source_kind("demo") is SourceKind.DEMO
    assert source_kind(str(tmp_path)) is SourceKind.FOLDER
    assert source_kind(str(tmp_path / "m.GGUF")) is SourceKind.GGUF
    assert source_kind("meta-llama/Llama-2-7b-chat-hf") is SourceKind.HUB
    assert source_kind("gpt2") is SourceKind.HUB


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("/no/such/folder", "no folder on this machine and no hub id"),
        ("./nothing", "no folder on this machine and no hub id"),
        ("a/b/c", "no folder on this machine and no hub id"),
        ("https://huggingface.co/a/b", "no folder on this machine and no hub id"),
        ("", "no folder on this machine and no hub id"),
        ("\0", "no folder on this machine and no hub id"),
        ("missing.gguf", "There is no file"),
    ],
)
def test_what_is_nowhere_is_said(source: str, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        source_kind(source)


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"is a file; model\.source is"):
        source_kind(str(tmp_path / "model.bin"))


def test_local_folder(llama_folder: Path, tmp_path: Path) -> None:
    files = resolve(ModelConfig(source=str(llama_folder)), tmp_path / "cache", progress=ignore_progress)
    assert (files.folder, files.tokenizer_folder, files.name) == (llama_folder, llama_folder, "tiny-llama")
    assert not (tmp_path / "cache").exists()
    named = ModelConfig(source=str(llama_folder), served_model_name="ours")
    assert resolve(named, tmp_path, progress=ignore_progress).name == "ours"


def test_another_tokenizer(llama_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.move(llama_folder / name, other / name)
    with pytest.raises(ModelError, match="holds no tokenizer"):
        resolve(ModelConfig(source=str(llama_folder)), tmp_path, progress=ignore_progress)
    model = ModelConfig(source=str(llama_folder), tokenizer=str(other))
    files = resolve(model, tmp_path, progress=ignore_progress)
    assert (files.folder, files.tokenizer_folder) == (llama_folder, other)


def test_an_ingress_needs_no_weights(llama_folder: Path, tmp_path: Path) -> None:
    for path in llama_folder.glob("model*"):
        path.unlink()
    model = ModelConfig(source=str(llama_folder))
    assert resolve(model, tmp_path, tokenizer_only=True, progress=ignore_progress).tokenizer_folder == llama_folder
    with pytest.raises(ModelError, match="holds no weights"):
        resolve(model, tmp_path, progress=ignore_progress)


def test_the_demo_answers_to_its_makers_id() -> None:
    assert aliases(ModelConfig()) == {"demo", "SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"}


@pytest.mark.parametrize(
    ("source", "name"), [("Qwen/Qwen3-0.6B", "Qwen3-0.6B"), ("own-model", "own-model")], ids=["owner", "no owner"]
)
def test_a_hub_model_answers_to_its_id(source: str, name: str) -> None:
    assert aliases(ModelConfig(source=source, served_model_name="chat")) == {source, name}


def test_a_folder_and_a_file_answer_to_their_names(tmp_path: Path) -> None:
    folder, file = tmp_path / "my-model", tmp_path / "tiny.Q4.gguf"
    folder.mkdir()
    file.touch()
    assert aliases(ModelConfig(source=f"{folder}/")) == {f"{folder}/", "my-model"}
    assert aliases(ModelConfig(source=str(file))) == {str(file), "tiny.Q4.gguf", "tiny.Q4"}
