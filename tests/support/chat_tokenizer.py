"""A small tokenizer with a chat template, for the tests of several rooms: it is trained in milliseconds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from serve_app.chat.tokenizer import ChatTokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    """Byte-level, with ChatML's template."""
    from small_tokenizers import CHATML, byte_level_backend
    from transformers import PreTrainedTokenizerFast

    from serve_app.chat.tokenizer import ChatTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_backend(), eos_token="<|im_end|>", unk_token="<|endoftext|>"
    )
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    return ChatTokenizer.load(folder)
