"""Turns token ids into text one at a time, as the model generates them.

Promises that the pieces concatenated are the text of the whole, that a piece is never taken back, and that a token
costs the same however long the answer is. Knows no stop strings.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Protocol

from serve_app.chat.tokenizer import ChatTokenizer
from serve_app.chat.tokenizer_error import TokenizerError

BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
"""A byte of a character that the vocabulary lacks, where the decoder has ByteFallback."""
_TOKENWISE = frozenset({"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace", "WordPiece", "BPEDecoder"})
"""Decoders of tokenizers whose text for a token depends on its neighbours only, or on whether it is the first."""


class Detokenizer(Protocol):
    """The text of one output.

    The pieces of all `push`es and the `flush` concatenated are `tokenizer.decode(output)`, or, with `prompt_ids`,
    `decode(prompt + output)` without the beginning that it shares with `decode(prompt)`. It shares all of
    `decode(prompt)`, unless the output completes a character that the prompt left unfinished.
    """

    def push(self, token_id: int) -> str:
        """The text that is certain now that this token came; empty while a character is incomplete."""
        ...

    def flush(self) -> str:
        """The output ended: the text that still waited, U+FFFD for what stayed incomplete."""
        ...


def new_detokenizer(
    tokenizer: ChatTokenizer, prompt_ids: Sequence[int] = (), shown_tokens: Sequence[str] = ()
) -> Detokenizer:
    """The detokenizer of one output. Raises `TokenizerError` for a decoder that can't be streamed.

    `prompt_ids`: of a raw prompt, which the output continues; empty for a chat, whose answer stands alone. Only the
    prompt's last few tokens are read. `shown_tokens`: special tokens whose text is their name, instead of none.
    """
    if tokenizer.decoder_kinds == {"ByteLevel"}:
        return _ByteLevel(tokenizer, prompt_ids, shown_tokens)
    if tokenizer.decoder_kinds <= _TOKENWISE:
        return _Tokenwise(tokenizer, prompt_ids, shown_tokens)
    raise TokenizerError(f"This tokenizer's decoder ({', '.join(sorted(tokenizer.decoder_kinds))}) can't be streamed.")


class _ByteLevel:
    """Every token is a few bytes, and the text is their UTF-8: an incremental decoder holds an unfinished character.

    Python's `replace` and Rust's lossy decoding both put one U+FFFD for each maximal ill-formed part (Unicode 3.9).
    """

    def __init__(self, tokenizer: ChatTokenizer, prompt_ids: Sequence[int], shown_tokens: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._own_texts = {**tokenizer.own_texts, **_named(tokenizer, shown_tokens)}
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        tail = b""
        for token_id in reversed(prompt_ids):
            tail = self._bytes(token_id) + tail
            if len(tail) >= 4:  # the lead byte of an unfinished character is among the last three bytes
                break
        self._decoder.decode(tail)
        self._shown = "\ufffd" if self._decoder.getstate()[0] else ""
        """What `decode(prompt)` already shows for the prompt's unfinished character."""

    def push(self, token_id: int) -> str:
        return self._less_shown(self._decoder.decode(self._bytes(token_id)))

    def flush(self) -> str:
        return self._less_shown(self._decoder.decode(b"", final=True))

    def _bytes(self, token_id: int) -> bytes:
        if (text := self._own_texts.get(token_id)) is not None:
            return text.encode()
        token = self._tokenizer.visible_token(token_id)
        return b"" if token is None else bytes_of(token)

    def _less_shown(self, text: str) -> str:
        if not text or not self._shown:
            return text
        shown, self._shown = self._shown, ""
        return text.removeprefix(shown)


class _Tokenwise:
    """Decodes a window: the last token whose text was given out, and the tokens after it.

    Byte tokens wait for the end of their run: ByteFallback decodes a run as a whole, and one wrong byte at its end
    turns all of it into U+FFFD, so until then nothing in it is certain.
    """

    def __init__(self, tokenizer: ChatTokenizer, prompt_ids: Sequence[int], shown_tokens: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._named = _named(tokenizer, shown_tokens)
        self._byte_fallback = "ByteFallback" in tokenizer.decoder_kinds
        self._window: list[int] = []
        for token_id in reversed(prompt_ids):
            token = tokenizer.visible_token(token_id)
            if token is not None:
                self._window.insert(0, token_id)
                if not self._is_byte(token):
                    break
        self._shown = tokenizer.decode(self._window)

    def push(self, token_id: int) -> str:
        if (name := self._named.get(token_id)) is not None:
            return self.flush() + name
        token = self._tokenizer.visible_token(token_id)
        if token is None:
            return ""
        self._window.append(token_id)
        if self._is_byte(token):
            return ""
        text = self._unshown()
        self._window = [token_id]
        self._shown = self._tokenizer.decode(self._window)
        return text

    def flush(self) -> str:
        text = self._unshown()
        self._shown = self._tokenizer.decode(self._window)
        return text

    def _is_byte(self, token: str) -> bool:
        return self._byte_fallback and BYTE_TOKEN.fullmatch(token) is not None

    def _unshown(self) -> str:
        text = self._tokenizer.decode(self._window)
        if text.startswith(self._shown):
            return text[len(self._shown) :]
        different = (index for index, (new, old) in enumerate(zip(text, self._shown, strict=False)) if new != old)
        return text[next(different, len(text)) :]


def _named(tokenizer: ChatTokenizer, tokens: Sequence[str]) -> dict[int, str]:
    """Id -> name of these tokens, as far as the tokenizer has them."""
    return {token_id: name for name in tokens if (token_id := tokenizer.token_id(name)) is not None}


@cache
def _byte_alphabet() -> Mapping[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes (bytes_to_unicode in openai/gpt-2, src/encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    stand_ins = printable + [256 + index for index in range(len(others))]
    return {chr(code): byte for code, byte in zip(stand_ins, printable + others, strict=True)}


def bytes_of(token: str) -> bytes:
    """A byte-level token's bytes; a token with a character that stands for no byte has those of its UTF-8."""
    alphabet = _byte_alphabet()
    try:
        return bytes(alphabet[character] for character in token)
    except KeyError:
        return token.encode("utf-8")
