"""Loading on a GPU: where weights go, in which dtype, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from model_builders import ignore_progress, tiny_config

from serve_app.config import ModelConfig
from serve_app.models.loader import LoadedModel, load
from serve_app.models.model_error import ModelError
from serve_app.models.source import resolve

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
IDS = [[5, 9, 200, 31, 7]]


def _load(folder: Path, **settings: Any) -> LoadedModel:
    model = ModelConfig(source=str(folder), **settings)
    return load(resolve(model, folder, progress=ignore_progress), model, has_gpu=True, progress=ignore_progress)


def _logits(loaded: LoadedModel) -> torch.Tensor:
    with torch.inference_mode():
        return loaded.model(torch.tensor(IDS, device=loaded.device)).logits.float().cpu()


def test_whole_model_on_the_gpu_in_the_checkpoints_dtype(llama_folder: Path) -> None:
    loaded = _load(llama_folder)
    assert (loaded.device.type, loaded.dtype) == ("cuda", torch.float32)
    assert {parameter.device.type for parameter in loaded.model.parameters()} == {"cuda"}
    on_cpu = _load(llama_folder, device="cpu")
    assert on_cpu.device.type == "cpu"
    assert on_cpu.fingerprint == loaded.fingerprint
    assert torch.allclose(_logits(loaded), _logits(on_cpu), atol=1e-3)
    assert _load(llama_folder, dtype="bfloat16").model.dtype == torch.bfloat16


def test_device_map(llama_folder: Path) -> None:
    loaded = _load(llama_folder, device_map="auto", dtype="float16")
    assert loaded.device.type == "cuda"
    assert {parameter.device.type for parameter in loaded.model.parameters()} == {"cuda"}


@pytest.mark.parametrize("quantization", ["bnb-int8", "bnb-nf4", "bnb-fp4"])
def test_bitsandbytes(tmp_path: Path, quantization: str) -> None:
    pytest.importorskip("bitsandbytes")
    from model_builders import tiny_tokenizer
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path / "m"
    LlamaForCausalLM(tiny_config(hidden_size=64, intermediate_size=128, head_dim=16)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    exact = _load(folder, dtype="float16")
    quantised = _load(folder, dtype="float16", quantization=quantization, device_map="auto")
    assert quantised.weights_bytes < exact.weights_bytes
    expected = _logits(exact)
    assert (_logits(quantised) - expected).norm() / expected.norm() < 0.3


def test_not_enough_gpu_memory(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _index: (1000, 2000))
    with pytest.raises(ModelError, match=r"needs .* GPU memory"):
        _load(llama_folder)
