"""Weights that were packed don't stay in memory a second time."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from serve_app.engine.cpu.library import Kernels
from serve_app.engine.cpu.linear import pack_linears
from serve_app.engine.host_memory import ask_for_huge_pages, page_out_mapped_weights
from serve_app.engine.kv_cache import KVCache, LayerShape


def resident_bytes(name: str) -> int:
    """Of the mappings of a file of this process."""
    maps = Path("/proc/self/smaps").read_text()
    blocks = re.findall(rf"{re.escape(name)}\n(?:.*\n)*?Rss: +(\d+) kB", maps)
    return 1024 * sum(int(block) for block in blocks)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_pages_of_mapped_weights_go_and_their_contents_stay(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    weights = torch.arange(4_000_000, dtype=torch.float32)
    save_file({"w": weights}, path)
    mapped = load_file(path)["w"]
    assert torch.equal(mapped, weights)
    if resident_bytes(str(path)) < 8_000_000:
        pytest.skip("this safetensors does not map files")
    page_out_mapped_weights()
    assert resident_bytes(str(path)) < 1_000_000
    assert torch.equal(mapped, weights)


def test_a_packed_model_still_computes_from_its_mapped_embedding(kernels: Kernels, tmp_path: Path) -> None:
    ids = torch.tensor([[1, 5, 9]])
    original = tiny_model("llama")
    original.set_attn_implementation("eager")
    original.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    pack_linears(loaded, kernels)
    page_out_mapped_weights()
    with torch.inference_mode():
        assert torch.allclose(loaded(ids).logits, original(ids).logits, atol=1e-4)


def test_without_proc_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.engine.host_memory._libc", lambda: pytest.fail("the system was asked"))
    page_out_mapped_weights(tmp_path / "maps")


def test_memory_asked_for_in_large_pages_is_ordinary_memory() -> None:
    for size in (1, 5000, 3 * 2**20):
        tensor = torch.empty(size)
        ask_for_huge_pages(tensor)
        tensor.fill_(2.0)
        assert tensor.sum().item() == 2.0 * size


@pytest.mark.skipif(sys.platform != "linux", reason="large pages are asked for on Linux")
def test_the_kv_cache_asks_before_it_is_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    resident_before: list[int] = []

    def ask(tensor: torch.Tensor) -> None:
        asked.append((tensor.data_ptr(), tensor.numel() * 4))
        resident_before.append(psutil.Process().memory_info().rss)

    monkeypatch.setattr("serve_app.engine.kv_cache.ask_for_huge_pages", ask)
    layer = LayerShape(4, 64, 64, torch.float32, torch.device("cpu"))
    cache = KVCache({0: layer}, 8192, 16)  # 128 MiB of keys and as much of values
    keys, values = cache.layer(0)
    assert asked == [(tensor.data_ptr(), 2**27) for tensor in (keys, values)]
    after = psutil.Process().memory_info().rss
    assert after - resident_before[1] > 2**26, "the values were written to after it"
    assert resident_before[1] - resident_before[0] > 2**26, "and the keys after theirs"
    assert not keys.any()
    assert not values.any()
