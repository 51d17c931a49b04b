from __future__ import annotations

import pytest

from serve_app.chat.token_texts import TokenTexts
from serve_app.chat.tokenizer import ChatTokenizer

TEXT = "naïve 你好 \U0001fae0 the fox\n"


@pytest.mark.parametrize("name", ["byte_level", "metaspace"])
def test_the_bytes_of_tokens_join_to_the_text(request: pytest.FixtureRequest, name: str) -> None:
    tokenizer: ChatTokenizer = request.getfixturevalue(name)
    texts = TokenTexts(tokenizer)
    ids = tokenizer.encode_text(TEXT, add_bos=False, parse_special=False)
    assert any("\ufffd" in texts.text(token_id) for token_id in ids), "no token is a part of a character"
    joined = b"".join(texts.utf8(token_id) or b"" for token_id in ids)
    assert joined.decode().removeprefix(" ") == TEXT  # SentencePiece puts a space before the text
    whole = [token_id for token_id in ids if "\ufffd" not in texts.text(token_id)]
    assert all(texts.utf8(token_id) == texts.text(token_id).encode() for token_id in whole)


def test_special_tokens_show_their_name(byte_level: ChatTokenizer) -> None:
    texts = TokenTexts(byte_level)
    ids = byte_level.encode_text("<|im_start|><|im_end|><think>", add_bos=False, parse_special=True)
    assert [texts.text(token_id) for token_id in ids] == ["<|im_start|>", "<|im_end|>", "<think>"]
    assert texts.utf8(ids[0]) == b"<|im_start|>"


def test_an_id_without_a_token_has_neither(byte_level: ChatTokenizer) -> None:
    texts = TokenTexts(byte_level)
    assert (texts.text(byte_level.vocab_size), texts.utf8(byte_level.vocab_size)) == ("", None)


def test_tokens_are_decoded_once(byte_level: ChatTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[list[int]] = []
    decode = ChatTokenizer.decode
    monkeypatch.setattr(ChatTokenizer, "decode", lambda self, ids: (decoded.append(ids), decode(self, ids))[1])
    texts = TokenTexts(byte_level)
    ids = byte_level.encode_text(TEXT, add_bos=False, parse_special=False)
    for _ in range(2):
        assert b"".join(texts.utf8(token_id) or b"" for token_id in ids).decode() == TEXT
        assert [texts.text(token_id) for token_id in ids] == [decode(byte_level, [token_id]) for token_id in ids]
    assert sorted(decoded) == sorted([token_id] for token_id in set(ids))
