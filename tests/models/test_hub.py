import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from fake_hub import COMMIT, FakeHub, serve_hub
from huggingface_hub import close_session, constants
from model_builders import ignore_progress
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPTJConfig, GPTJForCausalLM

from serve_app.config import ModelConfig
from serve_app.core import LoadStage
from serve_app.models.checkpoint import weight_files
from serve_app.models.hub import fetch
from serve_app.models.loader import load
from serve_app.models.model_error import ModelError
from serve_app.models.source import SourceKind, resolve

MODEL = ModelConfig(source="team/model")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees this machine's Hugging Face cache or token."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def _use(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def hub(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serve_hub(llama_folder) as hub:
        _use(monkeypatch, hub.url)
        yield hub


def test_fetches_one_format_and_what_goes_with_it(hub: FakeHub, tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "model.onnx", "model.gguf", "consolidated.00.pth", "code.py", "README.md"):
        (hub.folder / name).write_bytes(b"not wanted")
    (hub.folder / "original").mkdir()
    (hub.folder / "original" / "params.json").write_text("{}")
    (hub.folder / "model.fp16.safetensors").write_bytes(b"a duplicate")
    stages: list[LoadStage] = []
    files = resolve(MODEL, tmp_path / "cache", progress=stages.append)
    assert (files.kind, files.name, files.revision) == (SourceKind.HUB, "model", COMMIT)
    fetched = set(hub.fetched)
    assert {"config.json", "tokenizer.json", "generation_config.json"} <= fetched
    assert {name for name in fetched if name.endswith(".safetensors")} == {
        path.name for path in hub.folder.glob("model-*.safetensors")
    }
    assert not fetched & {"pytorch_model.bin", "model.onnx", "model.gguf", "code.py", "README.md"}
    assert not any("original" in name or name.endswith(".pth") for name in fetched)
    assert any(stage.stage.startswith("fetching team/model") and stage.fraction for stage in stages)


def test_of_a_single_file_and_shards_the_one_that_is_loaded_is_fetched(hub: FakeHub, tmp_path: Path) -> None:
    """A folder that was saved into twice."""
    state = {k: v for path in hub.folder.glob("model-*.safetensors") for k, v in load_file(path).items()}
    save_file(state, hub.folder / "model.safetensors", {"format": "pt"})
    files = resolve(MODEL, tmp_path / "cache", progress=ignore_progress)
    assert {name for name in hub.fetched if name.endswith(".safetensors")} == {"model.safetensors"}
    assert [path.name for path in weight_files(files.folder)] == ["model.safetensors"]


def test_an_ingress_fetches_no_weights(hub: FakeHub, tmp_path: Path) -> None:
    files = resolve(MODEL, tmp_path, tokenizer_only=True, progress=ignore_progress)
    assert (files.tokenizer_folder / "tokenizer.json").is_file()
    assert not any(name.endswith(".safetensors") for name in hub.fetched)


def test_a_second_start_fetches_nothing(hub: FakeHub) -> None:
    fetch(MODEL, tokenizer_only=False, progress=ignore_progress)
    hub.fetched.clear()
    fetch(MODEL, tokenizer_only=False, progress=ignore_progress)
    assert hub.fetched == []


@pytest.mark.parametrize("how", ["hub gone", "HF_HUB_OFFLINE"])
@pytest.mark.parametrize("revision", [None, "v1", COMMIT])
def test_what_is_cached_serves_without_the_hub(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, how: str, revision: str | None
) -> None:
    model = ModelConfig(source="team/model", revision=revision)
    fetched = fetch(model, tokenizer_only=False, progress=ignore_progress)
    if how == "hub gone":
        _use(monkeypatch, "http://127.0.0.1:9")
    else:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch(model, tokenizer_only=False, progress=ignore_progress) == fetched == (fetched[0], COMMIT)


def test_a_cache_without_weights_is_not_enough_offline(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch(MODEL, tokenizer_only=True, progress=ignore_progress)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fetch(MODEL, tokenizer_only=True, progress=ignore_progress)
    with pytest.raises(ModelError, match=r"not \(whole\) in .* HF_HUB_OFFLINE is set"):
        fetch(MODEL, tokenizer_only=False, progress=ignore_progress)


def test_pickles_are_refused_before_they_are_fetched(hub: FakeHub, tmp_path: Path) -> None:
    for path in hub.folder.glob("model*"):
        path.unlink()
    torch.save({}, hub.folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"team/model has only pickle weights"):
        resolve(MODEL, tmp_path, progress=ignore_progress)
    assert hub.fetched == []
    allowed = ModelConfig(source="team/model", allow_pickle_weights=True)
    assert (resolve(allowed, tmp_path, progress=ignore_progress).folder / "pytorch_model.bin").is_file()


def test_a_repository_of_other_formats(hub: FakeHub) -> None:
    for path in hub.folder.glob("model*"):
        path.unlink()
    (hub.folder / "model.Q4.gguf").write_bytes(b"")
    with pytest.raises(ModelError, match=r"no weights that can be served \(only \.gguf\)"):
        fetch(MODEL, tokenizer_only=False, progress=ignore_progress)


def test_an_architecture_that_cannot_be_served_is_refused_before_its_weights(hub: FakeHub) -> None:
    shutil.rmtree(hub.folder)
    GPTJForCausalLM(GPTJConfig(vocab_size=9, n_embd=8, n_layer=1, n_head=1, rotary_dim=4)).save_pretrained(hub.folder)
    with pytest.raises(ModelError, match="GPTJForCausalLM"):
        fetch(MODEL, tokenizer_only=False, progress=ignore_progress)
    assert "model.safetensors" not in hub.fetched


def test_gated_model(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated = True
    with pytest.raises(ModelError, match=r"licence accepted at http://.*/team/model and a token: set HF_TOKEN"):
        fetch(MODEL, tokenizer_only=False, progress=ignore_progress)
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    with pytest.raises(ModelError, match="Your token has no access to team/model"):
        fetch(MODEL, tokenizer_only=False, progress=ignore_progress)


def test_missing_model_and_revision(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"The hub has no model team/other.* set HF_TOKEN"):
        fetch(ModelConfig(source="team/other"), tokenizer_only=False, progress=ignore_progress)
    with pytest.raises(ModelError, match="team/model has no revision 'v9'"):
        fetch(ModelConfig(source="team/model", revision="v9"), tokenizer_only=False, progress=ignore_progress)


def test_no_space_for_the_weights(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(ModelError, match="GB are free"):
        fetch(MODEL, tokenizer_only=False, progress=ignore_progress)
    assert not any(name.endswith(".safetensors") for name in hub.fetched)


def test_no_network_is_said_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, "http://127.0.0.1:9")
    monkeypatch.setattr(time, "sleep", None)  # nothing is waited for
    with pytest.raises(ModelError, match=r"hub http://127\.0\.0\.1:9 can't be reached .* not in"):
        fetch(MODEL, tokenizer_only=False, progress=ignore_progress)


@pytest.fixture
def proxies(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Sets ALL_PROXY, as a desktop does; huggingface_hub reads it when it makes its HTTP client."""

    def use(value: str) -> None:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("ALL_PROXY", value)
        close_session()

    yield use
    monkeypatch.undo()
    close_session()


@pytest.mark.parametrize("value", ["socks://127.0.0.1:9", "socks5://127.0.0.1:9", "ftp://127.0.0.1:9"])
def test_odd_proxy_settings_keep_no_cached_model_from_being_served(
    hub: FakeHub, proxies: Callable[[str], None], value: str
) -> None:
    fetched = fetch(MODEL, tokenizer_only=False, progress=ignore_progress)
    proxies(value)
    assert fetch(MODEL, tokenizer_only=False, progress=ignore_progress) == fetched
    with pytest.raises(ModelError, match=r"hub http://127\.0\.0\.1:\d+ can't be reached") as caught:
        fetch(ModelConfig(source="team/other"), tokenizer_only=False, progress=ignore_progress)
    assert "\n" not in str(caught.value)


def test_odd_proxy_settings_keep_no_folder_from_being_loaded(
    llama_folder: Path, proxies: Callable[[str], None]
) -> None:
    proxies("socks://127.0.0.1:9")
    model = ModelConfig(source=str(llama_folder))
    files = resolve(model, llama_folder, progress=ignore_progress)
    assert load(files, model, has_gpu=False, progress=ignore_progress).name == "tiny-llama"
    assert AutoTokenizer.from_pretrained(files.tokenizer_folder, local_files_only=True)("hi")["input_ids"]
