"""The vocabulary of the two families of tokenizers, and grammars that can't be used."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import sentencepiece
from llguidance import LLMatcher
from small_tokenizers import CORPUS, byte_level_backend, metaspace_backend
from tokenizers import Tokenizer, decoders, models

from serve_app.grammar import (
    MAX_GRAMMAR_BYTES,
    GrammarError,
    Vocabulary,
    VocabularyError,
    compile_grammar,
    load_vocabulary,
    make_vocabulary,
    start_loading,
)

WORDS = LLMatcher.grammar_from_regex("(fox|dog)( fox| dog)*")


def folder_of(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def allowed(vocabulary: Vocabulary, matcher: LLMatcher) -> set[int]:
    mask = int.from_bytes(matcher.compute_bitmask(), "little")
    return {token_id for token_id in range(vocabulary.accept_id + 1) if mask >> token_id & 1}


@pytest.mark.parametrize("make", [byte_level_backend, metaspace_backend])
def test_the_accepting_id_lies_above_every_token_and_is_allowed_where_the_output_may_end(tmp_path: Path, make) -> None:
    tokenizer = make()
    vocabulary = load_vocabulary(folder_of(tmp_path, tokenizer))
    assert vocabulary.accept_id == max(tokenizer.get_vocab().values()) + 1
    assert vocabulary.mask_words == -(-(vocabulary.accept_id + 1) // 32)
    matcher = compile_grammar(vocabulary, WORDS)
    assert {tokenizer.id_to_token(token_id)[0] for token_id in allowed(vocabulary, matcher)} <= set("fd<")
    assert matcher.consume_tokens(vocabulary.tokenizer.tokenize_str("fox"))
    special = {token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    assert vocabulary.accept_id in allowed(vocabulary, matcher)
    assert not special & allowed(vocabulary, matcher), "a token that ends outputs is allowed by its own name"


def test_a_tokenizer_that_cuts_and_pads_has_the_same_vocabulary(tmp_path: Path) -> None:
    tokenizer = byte_level_backend()
    plain = make_vocabulary(json.loads(tokenizer.to_str()))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    other = load_vocabulary(folder_of(tmp_path, tokenizer))
    text = "The quick brown fox jumps"
    assert other.tokenizer.tokenize_str(text) == plain.tokenizer.tokenize_str(text)


def test_a_folder_with_only_sentencepiece_has_a_vocabulary(tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    vocabulary = load_vocabulary(tmp_path)
    assert vocabulary.accept_id >= 420
    matcher = compile_grammar(vocabulary, WORDS)
    assert matcher.consume_tokens(vocabulary.tokenizer.tokenize_str("fox dog"))
    assert matcher.is_accepting()


def test_a_vocabulary_of_the_unigram_kind(tmp_path: Path) -> None:
    pieces = [("<unk>", 0.0), *((letter, -2.0) for letter in "abcdefgox "), ("fox", -1.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    vocabulary = load_vocabulary(folder_of(tmp_path, tokenizer))
    assert vocabulary.accept_id == len(pieces)
    assert pieces.index(("fox", -1.0)) in allowed(vocabulary, compile_grammar(vocabulary, WORDS))


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"model": {"vocab": 3}, "added_tokens": []}', b"\xff\xfe"])
def test_a_broken_tokenizer_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(VocabularyError, match=r"^this model's tokenizer can't be used with a grammar: .+") as raised:
        load_vocabulary(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_tokenizer_whose_tokens_are_no_bytes_is_one_sentence(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "fox": 1, "##es": 2}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(VocabularyError, match="can't be used with a grammar: can't determine decoder type"):
        load_vocabulary(folder_of(tmp_path, tokenizer))


def test_it_may_be_loaded_beside_other_work(tmp_path: Path) -> None:
    assert start_loading(folder_of(tmp_path, byte_level_backend())).result(20).accept_id > 0
    with pytest.raises(VocabularyError):
        start_loading(tmp_path / "nowhere").result(20)


def test_a_folder_without_a_tokenizer_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(VocabularyError, match="can't be used with a grammar"):
        load_vocabulary(tmp_path)


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return make_vocabulary(json.loads(byte_level_backend().to_str()))


@pytest.mark.parametrize(
    "grammar",
    [
        "",
        "start: ((((",
        "{",
        "{}",
        "null",
        '{"grammars": []}',
        "start: \ud800",
        'start: <|no such token|> "a"',
        "start: start",
        LLMatcher.grammar_from_regex("(?=a)b("),
        LLMatcher.grammar_from_json_schema({"type": "strin"}),
        LLMatcher.grammar_from_json_schema({"not": {}}),
        LLMatcher.grammar_from_json_schema({"$ref": "#/nowhere"}),
    ],
)
def test_a_grammar_that_means_nothing_is_one_line(vocabulary: Vocabulary, grammar: str) -> None:
    with pytest.raises(GrammarError, match=r"^the grammar can't be (used|read): .+") as raised:
        compile_grammar(vocabulary, grammar)
    assert "\n" not in str(raised.value)


def test_the_text_of_a_grammar_is_limited_in_bytes(vocabulary: Vocabulary) -> None:
    comment = f'start: "a"\n// {"é" * (MAX_GRAMMAR_BYTES // 2 - 7)}'
    assert len(comment.encode()) == MAX_GRAMMAR_BYTES
    compile_grammar(vocabulary, comment)
    with pytest.raises(GrammarError, match=f"longer than {MAX_GRAMMAR_BYTES} bytes"):
        compile_grammar(vocabulary, f"{comment}é")


def test_a_schema_that_would_take_seconds_is_refused(vocabulary: Vocabulary) -> None:
    properties = {f"p{number}": {"type": "string"} for number in range(5000)}
    schema = {"type": "object", "properties": properties}
    with pytest.raises(GrammarError, match="too big"):
        compile_grammar(vocabulary, LLMatcher.grammar_from_json_schema(schema))
