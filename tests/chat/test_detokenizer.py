from __future__ import annotations

import json
from itertools import takewhile

import pytest
from exploring import cases
from hypothesis import given, settings
from hypothesis import strategies as st
from line_count import lines_run
from small_tokenizers import byte_level_backend, metaspace_backend
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from serve_app.chat.detokenizer import new_detokenizer
from serve_app.chat.token_texts import TokenTexts
from serve_app.chat.tokenizer import ChatTokenizer
from serve_app.chat.tokenizer_error import TokenizerError

TEXTS = ["Hello, world!", "  leading", "I am here", "naïve café 你好", "👩‍👩‍👧 🙂", "é\n\n1. x", "\ufffd", "ﷺ\x00"]
FAMILIES = ["demo_tokenizer", "byte_level", "metaspace"]
ALPHABET = frozenset(pre_tokenizers.ByteLevel.alphabet())
slow = settings(deadline=None, max_examples=cases(37, exploring=1000))


def pieces(tokenizer: ChatTokenizer, ids: list[int], prompt_ids: list[int]) -> list[str]:
    detokenizer = new_detokenizer(tokenizer, prompt_ids)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


def less(whole: str, shown: str) -> str:
    """`whole` without the beginning that it shares with `shown`."""
    return whole[sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(whole, shown, strict=False))) :]


@pytest.fixture(params=FAMILIES, scope="session")
def tokenizer(request: pytest.FixtureRequest) -> ChatTokenizer:
    loaded: ChatTokenizer = request.getfixturevalue(request.param)
    return loaded


def some_ids(tokenizer: ChatTokenizer) -> st.SearchStrategy[list[int]]:
    """Any ids, many of them single bytes and special tokens, and ids past the vocabulary; some real text."""
    anything = st.lists(st.integers(0, tokenizer.vocab_size + 5) | st.integers(0, 270), max_size=24)
    real = st.sampled_from(TEXTS).map(lambda text: tokenizer.encode_text(text, add_bos=False, parse_special=False))
    return st.lists(anything | real, max_size=3).map(lambda lists: [token_id for ids in lists for token_id in ids])


@slow
@given(data=st.data())
def test_the_pieces_of_a_chat_answer_are_its_decode(tokenizer: ChatTokenizer, data: st.DataObject) -> None:
    ids = data.draw(some_ids(tokenizer))
    assert "".join(pieces(tokenizer, ids, [])) == tokenizer.decode(ids)


@slow
@given(data=st.data())
def test_the_pieces_after_a_raw_prompt_are_what_it_adds(tokenizer: ChatTokenizer, data: st.DataObject) -> None:
    prompt, ids = data.draw(some_ids(tokenizer)), data.draw(some_ids(tokenizer))
    whole, shown = tokenizer.decode(prompt + ids), tokenizer.decode(prompt)
    assert "".join(pieces(tokenizer, ids, prompt)) == less(whole, shown)


@slow
@given(text=st.text(max_size=40))
def test_text_survives_both_ways(tokenizer: ChatTokenizer, text: str) -> None:
    ids = tokenizer.encode_text(text, add_bos=False, parse_special=False)
    assert "".join(pieces(tokenizer, ids, [])) == tokenizer.decode(ids)


def test_words_keep_their_spaces(tokenizer: ChatTokenizer) -> None:
    ids = tokenizer.encode_text("I am here", add_bos=False, parse_special=False)
    assert "".join(pieces(tokenizer, ids, [])) == "I am here"


def test_a_continued_prompt_keeps_the_space_between(tokenizer: ChatTokenizer) -> None:
    prompt = tokenizer.encode_text("the quick", add_bos=True, parse_special=False)
    whole = tokenizer.encode_text("the quick brown", add_bos=True, parse_special=False)
    assert whole[: len(prompt)] == prompt
    assert "".join(pieces(tokenizer, whole[len(prompt) :], prompt)) == " brown"


def test_a_character_comes_whole_or_not_at_all(tokenizer: ChatTokenizer) -> None:
    ids = tokenizer.encode_text("🙂 then 👩‍👩‍👧!", add_bos=False, parse_special=False)
    parts = pieces(tokenizer, ids, [])
    assert not any("\ufffd" in part for part in parts)
    assert "".join(parts) == "🙂 then 👩‍👩‍👧!"


@pytest.mark.parametrize("text", ["a 🦊", "🦊🦊b", "ʒe€", "你a"])
def test_a_prompt_cut_anywhere_is_continued(tokenizer: ChatTokenizer, text: str) -> None:
    """Also within a character, as a client's own token ids may be."""
    ids = tokenizer.encode_text(text, add_bos=False, parse_special=False)
    for cut in range(len(ids) + 1):
        expected = less(tokenizer.decode(ids), tokenizer.decode(ids[:cut]))
        assert "".join(pieces(tokenizer, ids[cut:], ids[:cut])) == expected


def test_a_genuine_replacement_character_does_not_stall(byte_level: ChatTokenizer) -> None:
    ids = byte_level.encode_text("\ufffd and on", add_bos=False, parse_special=False)
    detokenizer = new_detokenizer(byte_level)
    assert "".join(detokenizer.push(token_id) for token_id in ids) == "\ufffd and on"
    assert detokenizer.flush() == ""


def test_what_stays_incomplete_comes_with_the_flush(byte_level: ChatTokenizer, metaspace: ChatTokenizer) -> None:
    for tokenizer in (byte_level, metaspace):
        cut = tokenizer.encode_text("🦊", add_bos=False, parse_special=False)[:-1]
        detokenizer = new_detokenizer(tokenizer)
        assert "".join(detokenizer.push(token_id) for token_id in cut) == ""
        assert detokenizer.flush() == tokenizer.decode(cut) != ""
        assert detokenizer.flush() == ""


def test_special_tokens_have_no_text(byte_level: ChatTokenizer) -> None:
    end = byte_level.eos_token_id
    assert end is not None
    assert pieces(byte_level, [end, end], []) == ["", "", ""]


def test_a_token_costs_the_same_in_a_long_answer(tokenizer: ChatTokenizer) -> None:
    def lines(repeats: int) -> int:
        ids = tokenizer.encode_text("brown fox 🙂 again. " * repeats, add_bos=False, parse_special=False)
        detokenizer = new_detokenizer(tokenizer, ids)
        return lines_run(lambda: [detokenizer.push(token_id) for token_id in ids])

    assert lines(200) < 2.2 * lines(100)


@pytest.mark.parametrize(
    "decoder",
    [None, decoders.Metaspace(), decoders.WordPiece(), decoders.BPEDecoder(), decoders.Fuse()],
    ids=["none", "metaspace", "wordpiece", "bpe", "fuse"],
)
@slow
@given(data=st.data())
def test_other_decoders_are_followed_too(decoder: object, data: st.DataObject) -> None:
    tokenizer = tiny(decoder)
    prompt, ids = (data.draw(st.lists(st.integers(0, tokenizer.vocab_size), max_size=12)) for _ in range(2))
    whole, shown = tokenizer.decode(prompt + ids), tokenizer.decode(prompt)
    assert "".join(pieces(tokenizer, ids, prompt)) == less(whole, shown)


ADDED = ["đem", "é", "ö", "ÿ", "ł½", "Ġzq", "你好", "🙂", "a b", "\t\t", "  ", "<0x41>", "ﷺ", "naïve"]
"""Texts of added tokens. The letters of the first six are also those by which byte-level vocabularies write bytes."""


@pytest.fixture(params=["byte level", "byte fallback"], scope="module")
def with_added(request: pytest.FixtureRequest) -> ChatTokenizer:
    backend = byte_level_backend() if request.param == "byte level" else metaspace_backend()
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in ADDED])
    return from_backend(backend)


def added_ids(tokenizer: ChatTokenizer) -> list[int]:
    encoder = tokenizer._encoder
    known = json.loads(encoder.to_str())["model"]["vocab"]
    return [token_id for text in ADDED if text not in known and (token_id := encoder.token_to_id(text)) is not None]


@pytest.mark.parametrize("text", ["đem", "ł½", "Ġzq", "你好", "🙂", "naïve", "\t\t", "  "])
def test_an_added_tokens_text_is_its_own(with_added: ChatTokenizer, text: str) -> None:
    token_id = with_added._encoder.token_to_id(text)
    assert token_id is not None
    word = with_added._encoder.token_to_id("x")
    ids = [word, token_id, token_id, word]
    assert with_added.decode(ids) == f"x{text}{text}x"
    assert "".join(pieces(with_added, ids, [])) == with_added.decode(ids)
    assert pieces(with_added, ids[2:], ids[:2])[0] == text
    texts = TokenTexts(with_added)
    if text.strip():
        assert texts.text(token_id) == text
        assert texts.utf8(token_id) == text.encode()


def test_a_text_of_added_tokens_survives_both_ways() -> None:
    backend = byte_level_backend()
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in ADDED])
    tokenizer = from_backend(backend)
    text = "Ġzq đem ł½, naïve 你好 🙂\t\tđ Ġ a b"
    assert tokenizer.decode(tokenizer.encode_text(text, add_bos=False, parse_special=False)) == text


@slow
@given(data=st.data())
def test_the_pieces_are_the_decode_with_added_tokens_too(with_added: ChatTokenizer, data: st.DataObject) -> None:
    added = st.lists(st.sampled_from(added_ids(with_added)), max_size=3)
    drawn = st.lists(some_ids(with_added) | added, max_size=4).map(lambda lists: [i for ids in lists for i in ids])
    prompt, ids = data.draw(drawn), data.draw(drawn)
    assert "".join(pieces(with_added, ids, [])) == with_added.decode(ids)
    whole, shown = with_added.decode(prompt + ids), with_added.decode(prompt)
    assert "".join(pieces(with_added, ids, prompt)) == less(whole, shown)


@slow
@given(texts=st.lists(st.text(min_size=1, max_size=4).filter(str.strip), min_size=1, max_size=4), data=st.data())
def test_any_added_text_is_its_own_with_bytes_of_letters(texts: list[str], data: st.DataObject) -> None:
    backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate(sorted(ALPHABET))}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = [text for text in dict.fromkeys(texts) if text not in ALPHABET]
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in texts])
    tokenizer = from_backend(backend)
    for text in texts:
        token_id = backend.token_to_id(text)
        assert tokenizer.decode([token_id]) == text
        ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size), max_size=6).map(lambda ids: [*ids, token_id]))  # noqa: B023
        assert "".join(pieces(tokenizer, ids, [])) == tokenizer.decode(ids)
        assert tokenizer.decode(ids).endswith(text)


def test_a_string_that_the_models_vocabulary_has_is_bytes() -> None:
    backend = byte_level_backend()
    backend.add_tokens([AddedToken("é", special=False)])  # takes the id of the byte 0xE9
    tokenizer = from_backend(backend)
    assert tokenizer.own_texts == {}
    text = "\u9c7c"  # E9 B1 BC
    ids = [tokenizer._encoder.token_to_id(letter) for letter in ("é", "±", "¼")]
    assert tokenizer.decode(ids) == text
    assert "".join(pieces(tokenizer, ids, [])) == text


def from_backend(backend: Tokenizer) -> ChatTokenizer:
    return ChatTokenizer(backend.to_str(), control_tokens=[], template=None, special_tokens={}, adds_bos=False)


def test_a_decoder_that_can_not_be_followed_is_refused() -> None:
    with pytest.raises(TokenizerError, match="CTC"):
        new_detokenizer(tiny(decoders.CTC()))


def tiny(decoder: object) -> ChatTokenizer:
    words = ["▁", "▁a", "a", "##b", ".", "n't", "c</w>", " d", "<0x0A>", "▁▁e", "</s>"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="a"))
    if decoder is not None:
        backend.decoder = decoder
    backend.add_special_tokens(["</s>"])
    return ChatTokenizer(
        backend.to_str(),
        control_tokens=["</s>"],
        template=None,
        special_tokens={"eos_token": "</s>"},
        adds_bos=False,
    )


@pytest.mark.parametrize("byte_level", [True, False])
def test_a_special_token_that_is_a_mark_is_shown_by_its_name(byte_level: bool) -> None:
    backend = byte_level_backend() if byte_level else metaspace_backend()
    backend.add_special_tokens(["[CALL]"])
    tokenizer = ChatTokenizer(
        backend.to_str(), control_tokens=["[CALL]"], template=None, special_tokens={}, adds_bos=False
    )
    mark = tokenizer.token_id("[CALL]")
    assert mark is not None
    words = tokenizer.encode_text("the quick", add_bos=False, parse_special=False)
    ids = [*words, mark, *words]
    hidden, shown = new_detokenizer(tokenizer), new_detokenizer(tokenizer, shown_tokens=["[CALL]", "[OTHER]"])
    assert "".join(map(hidden.push, ids)) + hidden.flush() == tokenizer.decode(ids)
    text = "".join(map(shown.push, ids)) + shown.flush()
    assert text.replace("[CALL]", "", 1) == tokenizer.decode(ids)
    assert text.startswith("the quick[CALL]")
