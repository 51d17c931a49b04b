"""How a single token is shown beside its logprob: a text for people, and its bytes.

Promises the token's own bytes also for a part of a character, which has no text. Knows no answer.
"""

from __future__ import annotations

from functools import lru_cache

from serve_app.chat.detokenizer import BYTE_TOKEN, bytes_of
from serve_app.chat.tokenizer import ChatTokenizer

KEPT = 16_384
"""Tokens whose texts are kept, 4 MB: to decode one takes 5 us, to look it up 0.1 us (AVX2)."""


class TokenTexts:
    """Texts and bytes of the tokens of one tokenizer."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self._byte_level = tokenizer.decoder_kinds == {"ByteLevel"}
        self._byte_fallback = "ByteFallback" in tokenizer.decoder_kinds
        self._kept = lru_cache(KEPT)(self._shown)

    def text(self, token_id: int) -> str:
        """The token's own text; U+FFFD for a part of a character, the token's name for a special token."""
        return self._kept(token_id)[0]

    def utf8(self, token_id: int) -> bytes | None:
        """The token's bytes; those of its name for a special token, None for an id without a token."""
        return self._kept(token_id)[1]

    def _shown(self, token_id: int) -> tuple[str, bytes | None]:
        text = self._text(token_id)
        return text, self._utf8(token_id, text)

    def _text(self, token_id: int) -> str:
        token = self._tokenizer.token_at(token_id)
        if token is not None and token in self._tokenizer.skipped_tokens:
            return token
        text = self._tokenizer.decode([token_id])
        # A SentencePiece decoder drops the space before the first word, and here every token is the first.
        return f" {text}" if token is not None and token.startswith("▁") and not text.startswith(" ") else text

    def _utf8(self, token_id: int, text: str) -> bytes | None:
        token = self._tokenizer.token_at(token_id)
        if token is None:
            return None
        if token not in self._tokenizer.skipped_tokens:
            if self._byte_level and token_id not in self._tokenizer.own_texts:
                return bytes_of(token)
            if self._byte_fallback and BYTE_TOKEN.fullmatch(token):
                return bytes([int(token[3:5], 16)])
        return text.encode()


class TokenNumbers(TokenTexts):
    """The tokens of a tokenizer by their ids, instead of their texts: no two tokens are shown alike."""

    def text(self, token_id: int) -> str:
        """The token's id, as vLLM writes it."""
        return f"token_id:{token_id}"

    def utf8(self, token_id: int) -> bytes | None:
        """The bytes of `text`."""
        return self.text(token_id).encode()
