"""A model's tokenizer: text to ids and ids to text, with control tokens under our control.

Promises that nothing in it changes after loading, so threads share it freely, and that text encoded as text never
becomes a control token. Knows no network: it loads from a folder that is already here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from serve_app.chat.prompt_error import PromptError
from serve_app.chat.rendering import try_render
from serve_app.chat.template_style import PROBE_TOOL, call_styles, probe_turns, template_message, template_tool
from serve_app.chat.tokenizer_error import TokenizerError
from serve_app.chat.unicode import require_unicode

_PROBES = [
    [{"role": role, "content": "a"} for role in roles]
    for roles in (("user", "assistant", "user"), ("system", "user"), ("developer", "user"))
]
"""Chats to see which tokens a template writes; it may refuse some."""
_RARE_TEXT = "\U0010fffd\U0001242b"
"""Characters that no vocabulary without byte tokens knows: the last of Unicode's private ones, a cuneiform sign."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a prompt: `literal` text can't become a control token, other text can."""

    text: str
    literal: bool


class ChatTokenizer:
    """Make one with `load`. Safe to use from any number of threads at once.

    It holds two copies of the tokenizer, one that knows control tokens and one that reads them as text, because
    transformers keeps that choice in a flag on the one tokenizer it has: two threads that set it differently would let
    control tokens through, or fail with "Already borrowed".
    """

    def __init__(
        self,
        backend: str,
        *,
        control_tokens: Iterable[str],
        template: str | None,
        special_tokens: Mapping[str, str],
        adds_bos: bool,
        response_template: Mapping[str, object] | None = None,
        tool_template: str | None = None,
    ) -> None:
        """From the JSON of a tokenizers.Tokenizer. `control_tokens`: the added tokens that text must not become."""
        description = json.loads(backend)
        control = frozenset(control_tokens)
        self._encoder = _copy(description, control, as_text=False)
        self._literal_encoder = _copy(description, control, as_text=True)
        self._normalizer: Any = self._literal_encoder.normalizer
        self._newline_ids = self._encoder.encode("\n", add_special_tokens=False).ids
        vocabulary = self._encoder.get_vocab(with_added_tokens=True)

        self.template = template
        self.response_template = response_template
        """How an answer is read, if the checkpoint declares it; see transformers' `parse_response`."""
        self.tool_template = tool_template
        """The template for chats with tools, where a model brings one beside `template`."""
        self.special_tokens = dict(special_tokens)
        """Variables for the template, e.g. `bos_token`."""
        self.skipped_tokens = frozenset(token["content"] for token in description["added_tokens"] if token["special"])
        """Tokens that `decode` leaves out: the special ones. A model's `<think>` often isn't special."""
        self.added_tokens = {token["content"]: int(token["id"]) for token in description["added_tokens"]}
        """Name -> id of the tokens beside the words of the vocabulary, special or not."""
        self.control_tokens = control
        unknown = self._literal_encoder.encode(_RARE_TEXT, add_special_tokens=False).ids
        self.control_ids = frozenset(vocabulary[token] for token in control).difference(unknown)
        """Ids that text must not become. The id for unknown characters is not among them: text does become that."""
        self.bos_token_id: int | None = vocabulary.get(special_tokens.get("bos_token", ""))
        self.eos_token_id: int | None = vocabulary.get(special_tokens.get("eos_token", ""))
        self.adds_bos = adds_bos and self.bos_token_id is not None
        """Whether this model's prompts normally begin with BOS."""
        self.vocab_size = max(vocabulary.values()) + 1
        """Ids are below this. A model's embedding may be larger (padded); those ids have no text."""
        self.longest_token_chars = max(map(len, vocabulary))
        self.decoder_kinds = _decoder_kinds(description["decoder"])
        """How token strings become text: the types of the decoders that the tokenizer's decoder is made of."""
        self.own_texts = self._own_texts(description)
        """Id -> text of the added tokens that the decoder would garble: it reads their text as GPT-2's byte letters."""

    @classmethod
    def load(cls, folder: Path, *, trust_remote_code: bool = False, template: str | None = None) -> ChatTokenizer:
        """The tokenizer in `folder`. `template` replaces its own chat template (`ChatConfig.template`).

        Raises `TokenizerError` when there is none, when it has no fast (tokenizers) form, or when the template is
        broken.
        """
        # Imported late: by then the process has chosen whether with torch (`import_without_torch`), and an actor that
        # keeps journals needs neither.
        from transformers import AutoTokenizer

        try:
            loaded = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, use_fast=True, trust_remote_code=trust_remote_code
            )
        except Exception as error:  # tokenizers raises a bare Exception for a broken file
            raise TokenizerError(f"No tokenizer can be loaded from {folder}: {_first_line(error)}") from error
        if not loaded.is_fast:
            raise TokenizerError(
                f"{type(loaded).__name__} is a pure Python tokenizer; serve_app needs a fast one (a tokenizer.json)."
            )
        tool_template = None
        if template is None and loaded.chat_template is not None:
            template = _own_template(loaded)
            tool_template = _own_tool_template(loaded)
        backend = loaded.backend_tokenizer.to_str()
        special_tokens = {key: str(token) for key, token in loaded.special_tokens_map.items() if isinstance(token, str)}
        listed = getattr(loaded, "chat_control_tokens", None) or ()
        return cls(
            backend,
            control_tokens=_control_tokens(backend, template, special_tokens, frozenset(listed))
            | _control_tokens(backend, tool_template, special_tokens, frozenset(listed)),
            template=template,
            tool_template=tool_template,
            special_tokens=special_tokens,
            response_template=getattr(loaded, "response_template", None),
            adds_bos=loaded.bos_token_id is not None and loaded("a")["input_ids"][:1] == [loaded.bos_token_id],
        )

    def encode_text(self, text: str, *, add_bos: bool, parse_special: bool) -> list[int]:
        """A raw prompt. Control tokens in it stay text unless `parse_special`.

        `add_bos` gives it the BOS that this tokenizer normally adds, once: not when the text already begins with it.
        Raises `PromptError` for text that is not valid Unicode.
        """
        require_unicode(text, "prompt")
        ids = self._encode(text, literal=not parse_special)
        if add_bos and self.adds_bos and self.bos_token_id is not None and ids[:1] != [self.bos_token_id]:
            ids.insert(0, self.bos_token_id)
        return ids

    def encode_pieces(self, pieces: Iterable[Piece]) -> list[int]:
        """A prompt in stretches, as if it were one text wherever that is possible. No BOS is added."""
        ids: list[int] = []
        for index, piece in enumerate(piece for piece in pieces if piece.text):
            encode = self._encode if index == 0 else self._encode_later
            ids += encode(piece.text, literal=piece.literal)
        return ids

    def encode_apart(self, text: str, *, first: bool, parse_special: bool) -> list[int]:
        """A text between tokens that are given as ids. `first`: it is the first text of its prompt. No BOS is added.

        Control tokens in it are text unless `parse_special`. Raises `PromptError` for text that is not valid Unicode.
        """
        require_unicode(text, "prompt")
        if not text:
            return []
        return (self._encode if first else self._encode_later)(text, literal=not parse_special)

    def token_id(self, token: str) -> int | None:
        """The id of a token by its string in the vocabulary; None if there is none."""
        found: int | None = self._encoder.token_to_id(token)
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens skipped and spaces as they are. Ids without a token have no text."""
        if self.own_texts.keys().isdisjoint(ids):
            return self._decode(ids)
        stretches = groupby(ids, key=self.own_texts.get)
        return "".join(self._decode(list(some)) if text is None else text * len(list(some)) for text, some in stretches)

    def shown(self, ids: Sequence[int]) -> str:
        """The text of `ids` with the names of special tokens in their places."""
        return self._encoder.decode(ids, skip_special_tokens=False)

    def normalized(self, text: str) -> str:
        """The text as the tokenizer normalises it before it splits it: texts that are then equal have the same ids."""
        return text if self._normalizer is None else str(self._normalizer.normalize_str(text))

    def visible_token(self, token_id: int) -> str | None:
        """The token's string in the vocabulary (not its text), or None when `decode` skips it."""
        token = self.token_at(token_id)
        return None if token in self.skipped_tokens else token

    def token_at(self, token_id: int) -> str | None:
        """The string of any token in the vocabulary; None for ids without one."""
        token: str | None = self._encoder.id_to_token(token_id)
        return token

    def fewest_tokens(self, text: str) -> int:
        """A lower bound on the tokens of `text`, without encoding it: as if each were the vocabulary's longest.

        Text that the tokenizer drops (SmolLM2's has no token for the byte 0x06) or shortens (composed characters, to a
        third at most) is counted in full; prompts mostly of such text may be refused without need.
        """
        return -(-len(text) // self.longest_token_chars)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._encoder.decode(ids, skip_special_tokens=True)

    def _own_texts(self, description: Mapping[str, Any]) -> Mapping[int, str]:
        """See `own_texts`. A string that is in the model's vocabulary, too, may come from merges: it stands for bytes.

        Only the byte-level decoder reads letters as other letters ("đ" as the byte 0x0F).
        """
        if self.decoder_kinds != {"ByteLevel"}:
            return {}
        vocabulary = description["model"]["vocab"]
        texts = {token["id"]: token["content"] for token in description["added_tokens"] if not token["special"]}
        return {
            token_id: text
            for token_id, text in texts.items()
            if text not in vocabulary and self._decode([token_id]) != text
        }

    def _encode(self, text: str, *, literal: bool) -> list[int]:
        """The ids of a stretch of a prompt. A `literal` one that can't be read as text is refused: `PromptError`."""
        ids = _encode(self._literal_encoder if literal else self._encoder, text)
        if literal and not self.control_ids.isdisjoint(ids):  # some vocabularies (Unigram) hold control tokens as words
            raise PromptError("The text contains a control token that this model's tokenizer can't read as text.")
        return ids

    def _encode_later(self, text: str, *, literal: bool) -> list[int]:
        """The ids of a piece that is not the first: encoded after a newline, whose ids are then removed.

        Without it SentencePiece models would put a space before the piece (as in transformers' `encode_marked_chat`).
        """
        ids = self._encode(f"\n{text}", literal=literal)
        if ids[: len(self._newline_ids)] == self._newline_ids:
            return ids[len(self._newline_ids) :]
        return self._encode(text, literal=literal)


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text, while other threads run.

    `encode` holds Python's global lock until it is done: with 640,000 characters in a thread, the event loop stood
    still for 2 s. `encode_batch_fast` releases the lock, even for a single text.
    """
    ids: list[int] = tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
    return ids


def _decoder_kinds(decoder: Mapping[str, Any] | None) -> frozenset[str]:
    if decoder is None:
        return frozenset()
    if decoder["type"] == "Sequence":
        return frozenset().union(*map(_decoder_kinds, decoder["decoders"]))
    return frozenset({decoder["type"]})


def _copy(description: Mapping[str, Any], control: frozenset[str], *, as_text: bool) -> Tokenizer:
    """A tokenizer that reads control tokens as tokens or as text.

    Control tokens are matched in the text as it is, never in its normalised form: else a look-alike (fullwidth letters
    under NFKC) would become a control token, and `templates` would not find it.
    """
    added = []
    for token in description["added_tokens"]:
        is_control = token["content"] in control
        special = is_control if as_text else token["special"]
        added.append({**token, "normalized": token["normalized"] and not is_control, "special": special})
    plain = {**description, "added_tokens": added, "truncation": None, "padding": None}
    tokenizer = Tokenizer.from_str(json.dumps(plain))
    tokenizer.encode_special_tokens = as_text
    return tokenizer


def _control_tokens(
    backend: str, template: str | None, special_tokens: Mapping[str, str], listed: frozenset[str]
) -> frozenset[str]:
    """Special tokens, those the tokenizer lists, and those the template writes, whole or built from pieces.

    Whitespace tokens (Gemma's newlines) are ordinary text even where a template writes them. The rule is that of
    transformers' `sanitize_control_tokens`, and the probe finds what it misses ('<|' + role + '|>').
    """
    tokenizer = Tokenizer.from_str(backend)
    shown = [try_render(template or "", probe, special_tokens) for probe in _PROBES]
    for style in call_styles():
        messages = [template_message(message, style) for message in probe_turns(reasoning="a")]
        shown.append(try_render(template or "", messages, special_tokens, [template_tool(PROBE_TOOL)]))
    written = {token_id for text in shown for token_id in tokenizer.encode(text, add_special_tokens=False).ids}
    return frozenset(
        token.content
        for token_id, token in tokenizer.get_added_tokens_decoder().items()
        if token.special
        or token.content in listed
        or (token.content.strip(" \t\r\n▁") and (token_id in written or token.content in (template or "")))
    )


def _own_template(loaded: Any) -> str:
    """The tokenizer's template for plain chats: some bring several, by name."""
    try:
        return str(loaded.get_chat_template())
    except ValueError as error:
        raise TokenizerError(f"The tokenizer has no default chat template: {_first_line(error)}") from error


def _own_tool_template(loaded: Any) -> str | None:
    named = loaded.chat_template
    return named.get("tool_use") if isinstance(named, Mapping) else None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
