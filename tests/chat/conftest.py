"""Tokenizers to test with: the demo model's, and small ones of the two families."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from small_tokenizers import CHATML, byte_level_backend, llama_like, metaspace_backend
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from serve_app.chat.tokenizer import ChatTokenizer
from serve_app.models.cache import cache_directory
from serve_app.models.demo import ensure_demo_model


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The converted demo model, fetched once into the usual cache."""
    return ensure_demo_model(cache_directory(), lambda stage: None)


@pytest.fixture(scope="session")
def demo_tokenizer(demo_folder: Path) -> ChatTokenizer:
    return ChatTokenizer.load(demo_folder)


SaveTokenizer = Callable[..., Path]
"""save_tokenizer(backend, template=None, **special_tokens): the folder it is saved in."""


@pytest.fixture(scope="session")
def save_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SaveTokenizer:
    def save(backend: Tokenizer, template: str | None = None, **special_tokens: str) -> Path:
        folder = tmp_path_factory.mktemp("tokenizer")
        fast = PreTrainedTokenizerFast(tokenizer_object=backend, **special_tokens)
        fast.chat_template = template
        fast.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def byte_level_folder(save_tokenizer: SaveTokenizer) -> Path:
    return save_tokenizer(
        byte_level_backend(), CHATML, bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="<|endoftext|>"
    )


@pytest.fixture(scope="session")
def byte_level(byte_level_folder: Path) -> ChatTokenizer:
    return ChatTokenizer.load(byte_level_folder)


@pytest.fixture(scope="session")
def metaspace(save_tokenizer: SaveTokenizer) -> ChatTokenizer:
    folder = save_tokenizer(metaspace_backend(), bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return ChatTokenizer.load(folder)


@pytest.fixture(scope="session")
def llama2(save_tokenizer: SaveTokenizer) -> ChatTokenizer:
    """Llama-2's ids for the pieces of its golden text, and single characters; its real vocabulary has a licence."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocab |= {"▁[": 518, "INST": 25580, "▁Hi": 6324, "]": 29962, "/": 29914}
    merges = [["▁", "["], ["I", "N"], ["S", "T"], ["IN", "ST"], ["H", "i"], ["▁", "Hi"]]
    words = sorted({part for pair in merges for part in pair} | set("abcdefgimnorstuwy<>S!?.,▁"))
    vocab |= {word: 30000 + index for index, word in enumerate(words) if word not in vocab}
    return ChatTokenizer.load(save_tokenizer(llama_like(vocab, merges), bos_token="<s>", eos_token="</s>"))
