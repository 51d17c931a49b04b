"""A tiny random Llama on disk, one copy a test; conversions in the process of the tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from model_builders import tiny_config, tiny_tokenizer
from transformers import LlamaForCausalLM

from serve_app.models import source
from serve_app.models.conversion import convert_here


@pytest.fixture(scope="session")
def _saved_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "tiny-llama"
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config()).save_pretrained(folder, max_shard_size="40KB")
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def llama_folder(_saved_llama: Path, tmp_path: Path) -> Path:
    """A tiny Llama in several shards, this test's own copy."""
    return Path(shutil.copytree(_saved_llama, tmp_path / "tiny-llama"))


@pytest.fixture
def converts_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """GGUF is converted in this process: one of its own imports transformers again, which takes seconds."""
    monkeypatch.setattr(source, "convert", convert_here)
