"""A small tokenizer with a chat template, for the tests of several rooms: it is trained in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from serve_app.chat.tokenizer import ChatTokenizer


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> ChatTokenizer:
    """Byte-level, with ChatML's template."""
    from serve_app.chat.tokenizer import ChatTokenizer

    return ChatTokenizer.load(tokenizer_folder)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the files of `tokenizer` are."""
    from small_tokenizers import CHATML, byte_level_backend
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tokenizer")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_backend(), eos_token="<|im_end|>", unk_token="<|endoftext|>"
    )
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    return folder
