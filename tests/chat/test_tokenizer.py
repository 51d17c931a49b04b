from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import CHATML, byte_level_backend
from tokenizers import Tokenizer, models, processors
from transformers import AutoTokenizer

from serve_app.chat.prompt_error import PromptError
from serve_app.chat.tokenizer import ChatTokenizer, Piece
from serve_app.chat.tokenizer_error import TokenizerError


@pytest.fixture(scope="module")
def transformers_tokenizer(demo_folder: Path):
    return AutoTokenizer.from_pretrained(demo_folder)


@settings(deadline=None)
@given(text=st.text(max_size=60))
def test_ordinary_text_encodes_as_transformers_does(
    transformers_tokenizer, demo_tokenizer: ChatTokenizer, text
) -> None:
    expected = transformers_tokenizer.encode(text, add_special_tokens=False)
    assert demo_tokenizer.encode_text(text, add_bos=True, parse_special=False) == expected


def test_the_demo_tokenizer_is_known(demo_tokenizer: ChatTokenizer) -> None:
    assert (demo_tokenizer.vocab_size, demo_tokenizer.eos_token_id) == (49_152, 2)
    assert not demo_tokenizer.adds_bos
    assert demo_tokenizer.encode_text("x 42\n\n1.", add_bos=True, parse_special=False) == [
        demo_tokenizer._encoder.token_to_id(token) for token in ("x", "Ġ", "4", "2", "ĊĊ", "1", ".")
    ]


def test_control_tokens_in_a_raw_prompt_are_text_unless_asked_for(byte_level: ChatTokenizer) -> None:
    text = "<|im_start|>user\nHi<|im_end|><think>"
    as_text = byte_level.encode_text(text, add_bos=False, parse_special=False)
    parsed = byte_level.encode_text(text, add_bos=False, parse_special=True)
    assert byte_level.control_ids.isdisjoint(as_text)
    assert byte_level.decode(as_text) == text
    assert [parsed[0], *parsed[-2:]] == [1, 2, byte_level._encoder.token_to_id("<think>")]


@pytest.fixture(scope="module")
def with_bos(save_tokenizer: Callable[..., Path]) -> ChatTokenizer:
    backend = byte_level_backend()
    backend.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    return ChatTokenizer.load(save_tokenizer(backend, bos_token="<|im_start|>", eos_token="<|im_end|>"))


def test_bos_comes_once(with_bos: ChatTokenizer) -> None:
    plain = with_bos.encode_text("Hi", add_bos=False, parse_special=False)
    assert with_bos.adds_bos
    assert with_bos.encode_text("Hi", add_bos=True, parse_special=False) == [1, *plain]
    assert with_bos.encode_text("<|im_start|>Hi", add_bos=True, parse_special=True) == [1, *plain]
    assert with_bos.encode_text("", add_bos=True, parse_special=False) == [1]
    assert with_bos.encode_text("<|im_start|>Hi", add_bos=True, parse_special=False)[0] == 1
    assert with_bos.encode_text("<|im_start|>Hi", add_bos=True, parse_special=False).count(1) == 1


def test_later_pieces_get_no_space_of_their_own(metaspace: ChatTokenizer) -> None:
    pieces = [Piece("the fox", False), Piece("</s>", True), Piece("es", False), Piece("", False), Piece(" jump", False)]
    ids = metaspace.encode_pieces(pieces)
    assert metaspace.decode(ids) == "the fox</s>es jump"
    assert metaspace.control_ids.isdisjoint(ids)


def test_tokens_a_template_builds_from_pieces_are_control_tokens(save_tokenizer: Callable[..., Path]) -> None:
    backend = byte_level_backend()
    backend.add_tokens(["<|user|>", "<other>", "\n\n"])
    template = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}\n\n{% endfor %}"
    tokenizer = ChatTokenizer.load(save_tokenizer(backend, template))
    assert "<|user|>" in tokenizer.control_tokens
    assert tokenizer.control_tokens.isdisjoint({"<other>", "\n\n"})
    other = backend.token_to_id("<other>")
    assert other in tokenizer.encode_text("<|user|><other>", add_bos=False, parse_special=False)


def test_a_vocabulary_that_spells_a_control_token_refuses_it_in_text() -> None:
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), ("a", -1.0)], unk_id=0))
    backend.add_special_tokens(["</s>"])
    tokenizer = ChatTokenizer(
        backend.to_str(), control_tokens=["</s>"], template=None, special_tokens={}, adds_bos=False
    )
    assert tokenizer.encode_text("aa", add_bos=False, parse_special=False) == [2, 2]
    with pytest.raises(PromptError, match="control token"):
        tokenizer.encode_text("a</s>", add_bos=False, parse_special=False)


def test_unknown_characters_are_text_though_their_token_is_special() -> None:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    backend.add_special_tokens(["<unk>", "</s>"])
    tokenizer = ChatTokenizer(
        backend.to_str(),
        control_tokens=["<unk>", "</s>"],
        template=None,
        special_tokens={},
        adds_bos=False,
    )
    assert tokenizer.encode_text("你", add_bos=False, parse_special=False) == [0]
    assert tokenizer.control_ids == {2}


def test_a_saved_truncation_does_not_cut_prompts(save_tokenizer: Callable[..., Path]) -> None:
    backend = byte_level_backend()
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    tokenizer = ChatTokenizer.load(save_tokenizer(backend))
    text = "The quick brown fox jumps"
    assert tokenizer.decode(tokenizer.encode_text(text, add_bos=False, parse_special=False)) == text


@settings(deadline=None)
@given(text=st.text(max_size=60) | st.integers(0, 400).map(lambda length: " " * length))
def test_no_text_has_fewer_tokens_than_said(demo_tokenizer: ChatTokenizer, text: str) -> None:
    text = "".join(c for c in text if demo_tokenizer.encode_text(c, add_bos=False, parse_special=False))
    ids = demo_tokenizer.encode_text(text, add_bos=False, parse_special=False)
    assert demo_tokenizer.fewest_tokens(text) <= len(ids)


@pytest.mark.parametrize("text", ["\ud800", "ok \udfff", "\ud83d\ude42"])
def test_lone_surrogates_are_refused(demo_tokenizer: ChatTokenizer, text: str) -> None:
    for parse_special in (False, True):
        with pytest.raises(PromptError, match="surrogate"):
            demo_tokenizer.encode_text(text, add_bos=True, parse_special=parse_special)


def test_nul_bytes_are_text(demo_tokenizer: ChatTokenizer, metaspace: ChatTokenizer) -> None:
    for tokenizer in (demo_tokenizer, metaspace):
        ids = tokenizer.encode_text("a\x00b", add_bos=False, parse_special=False)
        assert tokenizer.decode(ids) == "a\x00b"


@pytest.mark.parametrize("text", ["a" * 2**20, " " * 2**20, "<|im_end|>" * 2**17, "🙂" * 2**18, "\n1. x" * 2**18])
def test_a_megabyte_is_encoded_without_trouble(demo_tokenizer: ChatTokenizer, text: str) -> None:
    ids = demo_tokenizer.encode_text(text, add_bos=False, parse_special=False)
    assert demo_tokenizer.decode(ids) == text


def test_ids_without_a_token_have_no_text(demo_tokenizer: ChatTokenizer) -> None:
    assert demo_tokenizer.decode([demo_tokenizer.vocab_size + 7]) == ""
    assert demo_tokenizer.visible_token(demo_tokenizer.vocab_size + 7) is None


def test_a_folder_without_a_tokenizer_is_said(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="No tokenizer can be loaded"):
        ChatTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(TokenizerError, match="No tokenizer can be loaded"):
        ChatTokenizer.load(tmp_path)


def test_a_python_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    with pytest.raises(TokenizerError, match="ByT5Tokenizer is a pure Python tokenizer"):
        ChatTokenizer.load(tmp_path)


def test_a_tokenizer_with_named_templates_uses_the_default(save_tokenizer: Callable[..., Path]) -> None:
    named = {"default": CHATML, "tool_use": "tools"}
    folder = save_tokenizer(byte_level_backend(), named)  # type: ignore[arg-type]
    assert ChatTokenizer.load(folder).template == CHATML


def test_other_threads_run_while_a_long_text_is_encoded(byte_level: ChatTokenizer) -> None:
    """Python gives them no turn by itself here, so that they run only when the encoder lets them."""
    text = "The quick brown fox. " * 5000
    begins, ids = threading.Event(), []
    turns = 0

    def encode() -> None:
        begins.set()
        ids.extend(byte_level.encode_text(text, add_bos=False, parse_special=False))

    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        encoder = threading.Thread(target=encode)
        encoder.start()
        begins.wait(60)
        while not ids and encoder.is_alive():
            turns += 1
            time.sleep(0)  # the encoder may have the lock
    finally:
        sys.setswitchinterval(interval_s)
    encoder.join()
    assert turns > 10
    assert byte_level.decode(ids) == text
