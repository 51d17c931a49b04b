"""Turns messages into ids through the model's own Hugging Face chat template, so that text stays text.

Promises the ids of transformers' `apply_chat_template` for ordinary messages, and that no message adds a control token
or a turn marker to those the template writes. Knows no HTTP.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

from serve_app.chat.conversation import ChatMessage
from serve_app.chat.options import DEFAULT_OPTIONS, ChatOptions
from serve_app.chat.prompt_error import PromptError
from serve_app.chat.rendering import TemplateMessage, own_variables, render, try_render
from serve_app.chat.tokenizer import ChatTokenizer, Piece
from serve_app.chat.tokenizer_error import TokenizerError
from serve_app.chat.turn_markers import TurnMarkers, find_turn_markers

logger = logging.getLogger(__name__)

_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
"""Unicode's noncharacters, kept for internal use: two that the messages lack fence a control token in the text."""
_SENTINEL = "serve_app-probe"


class ChatTemplate:
    """A chat template with the tokenizer it belongs to. Safe to use from any number of threads at once.

    Three defences, since a template is a program that may do anything with a text:

    1. Control tokens in message texts are fenced by marks before the template runs, and what comes out between two
       marks is encoded as text. (transformers' `sanitize_control_tokens` does the same; its form needs a tokenizer
       that threads can't share, so `ChatTokenizer` has two.)
    2. What is not a whole control token in one text can still become one: fields that join ("<|im_" before "end|>"), a
       template that changes case or cuts. So the control ids of the prompt must be those of the same messages made
       harmless; else the request is refused.
    3. Turn markers that are ordinary text are refused or broken in user and system texts (see `turn_markers`), and the
       prompt must have as many of them as the prompt of the same messages made harmless. The assistant's texts are
       taken as they are.

    Reasoning models' templates cut `<think>...</think>` out of earlier answers, by string operations that marks would
    disturb. So in the assistant's words non-special control tokens are left alone at first, and fenced only when that
    fails the comparison.
    """

    def __init__(self, tokenizer: ChatTokenizer, *, tags: Literal["reject", "escape"] = "reject") -> None:
        """`tags`: what to do with turn markers in user and system text.

        Raises `TokenizerError` when the tokenizer has no template or the template ignores what messages say.
        """
        if tokenizer.template is None:
            raise TokenizerError("This tokenizer has no chat template.")
        self._tokenizer = tokenizer
        self._template = tokenizer.template
        self._knows_developer = "developer" in self._template
        self._without_controls = _Disarmed(tokenizer.control_tokens)
        self._takes_parts = False
        self._takes_parts = self._needs_parts()
        markers = find_turn_markers(self._try, tokenizer.control_tokens)
        self._markers = TurnMarkers(markers, tokenizer, policy=tags, owner="this model's chat template")
        self._without_markers = _Disarmed(markers)
        self.variables = own_variables(self._template) - tokenizer.special_tokens.keys()
        """Names that `ChatOptions.variables` may set."""
        if markers:
            logger.info("turn markers of the chat template that are ordinary text: %s", " ".join(markers))

    def encode(self, messages: Sequence[ChatMessage], options: ChatOptions = DEFAULT_OPTIONS) -> list[int]:
        """The prompt's ids, by default up to where the assistant's answer begins.

        Raises `PromptError` when the template refuses the messages or when a text would add a control token or a turn
        marker, and for variables that are not the template's own.
        """
        if foreign := options.variables.keys() - self.variables:
            raise PromptError(f"This model's chat template has no variable {min(foreign)!r}.")
        if not self._knows_developer:
            messages = [replace(m, role="system") if m.role == "developer" else m for m in messages]
        messages = [self._markers.guarded(m, f"messages[{index}].content") for index, m in enumerate(messages)]
        self._check_markers(messages, options)
        harmless = [self._without_controls.message(message) for message in messages]
        harmless_options = self._without_controls.options(options)
        if (harmless, harmless_options) == (messages, options):
            return self._encode(messages, options, lenient=True)
        expected = self._controls(self._encode(harmless, harmless_options, lenient=True))
        for lenient in (True, False):
            ids = self._encode(messages, options, lenient=lenient)
            if self._controls(ids) == expected:
                return ids
        raise PromptError(
            "The messages contain text that would join into a control token of this model.", param="messages"
        )

    def _check_markers(self, messages: Sequence[ChatMessage], options: ChatOptions) -> None:
        """Raises `PromptError` when the template makes a turn marker of any text but the assistant's."""
        harmless = [m if m.role == "assistant" else self._without_markers.message(m) for m in messages]
        harmless_options = self._without_markers.options(options)
        if (harmless, harmless_options) == (messages, options):
            return
        if self._turns(messages, options) != self._turns(harmless, harmless_options):
            markers = ", ".join(self._markers.markers)
            message = f"The messages contain text that would join into a turn marker of this model ({markers})."
            raise PromptError(message, param="messages")

    def _turns(self, messages: Sequence[ChatMessage], options: ChatOptions) -> tuple[int, ...]:
        return self._markers.count("".join(piece.text for piece in self._pieces(messages, options, lenient=True)))

    def _encode(self, messages: Sequence[ChatMessage], options: ChatOptions, *, lenient: bool) -> list[int]:
        return self._tokenizer.encode_pieces(self._pieces(messages, options, lenient=lenient))

    def _pieces(self, messages: Sequence[ChatMessage], options: ChatOptions, *, lenient: bool) -> list[Piece]:
        """The rendered prompt. `lenient`: leave `<think>` in the assistant's texts for the template to cut or keep."""
        start, end, cut = _unused_marks(messages)
        fenced = self._fenced(messages, start, end, lenient=lenient)
        if options.continue_final_message:
            fenced[-1] = replace(fenced[-1], content=f"{fenced[-1].content}{cut} ")
        seen = [self._seen(message) for message in fenced]
        text = render(self._template, seen, self._tokenizer.special_tokens, options)
        if options.continue_final_message:
            text = _open_end(text, cut)
        return self._split(text, start, end)

    def _try(self, messages: Sequence[ChatMessage]) -> str:
        """The text of a trial; "" when the template refuses it."""
        seen = [self._seen(message) for message in messages]
        return try_render(self._template, seen, self._tokenizer.special_tokens)

    def _fenced(self, messages: Sequence[ChatMessage], start: str, end: str, *, lenient: bool) -> list[ChatMessage]:
        """The messages with marks around their control tokens."""
        fenced = []
        for message in messages:
            tokens = self._tokenizer.control_tokens
            if lenient and message.role == "assistant":
                tokens &= self._tokenizer.skipped_tokens
            if any(token in message.content for token in tokens):
                longest_first = sorted(tokens, key=len, reverse=True)
                pattern = "|".join(map(re.escape, longest_first))
                message = replace(message, content=re.sub(pattern, f"{start}\\g<0>{end}", message.content))
            fenced.append(message)
        return fenced

    def _split(self, text: str, start: str, end: str) -> list[Piece]:
        """Splits a rendered text at its marks, also at a mark whose partner the template has cut away."""
        first, *rest = text.split(start)
        pieces = [Piece(part, literal=False) for part in first.split(end)]
        for stretch in rest:
            token, mark, tail = stretch.partition(end)
            if mark and token in self._tokenizer.control_tokens:
                pieces.append(Piece(token, literal=True))
                stretch = tail
            pieces += [Piece(part, literal=False) for part in stretch.split(end)]
        return pieces

    def _seen(self, message: ChatMessage) -> TemplateMessage:
        content = [{"type": "text", "text": message.content}] if self._takes_parts else message.content
        seen: dict[str, object] = {"role": message.role, "content": content}
        return seen if message.name is None else {**seen, "name": message.name}

    def _needs_parts(self) -> bool:
        """Templates of some multimodal models read only lists of parts, and drop a plain string without a word."""
        probe = [ChatMessage("user", _SENTINEL)]
        for takes_parts in (False, True):
            self._takes_parts = takes_parts
            if _SENTINEL in self._try(probe):
                return takes_parts
        raise TokenizerError("The chat template does not show what a user message says.")

    def _controls(self, ids: list[int]) -> list[int]:
        control_ids = self._tokenizer.control_ids
        return [token_id for token_id in ids if token_id in control_ids]


class _Disarmed:
    """Makes messages harmless: no text in them can begin or end one of the given tokens."""

    def __init__(self, tokens: Iterable[str]) -> None:
        self._tokens = tuple(tokens)
        edges = {edge for token in self._tokens for edge in (token[0], token[-1])}
        edges |= {changed for edge in edges for changed in (edge.lower(), edge.upper())}
        self._filler = next((letter for letter in "xqzjkvwygbpfmhducnrstloaie" if letter not in edges), "x")
        self._harmless = str.maketrans(dict.fromkeys("".join(edges), self._filler))

    def message(self, message: ChatMessage) -> ChatMessage:
        """The message made harmless; an equal one if it is harmless already.

        Only characters that a token begins or ends with are replaced by a filler, because templates drop or refuse
        empty messages, and some look for words in them ("/no_think"). A text that is the inside of a token ("user" in
        "<|user|>") is replaced wholly, and so is a name.
        """
        if not self._tokens:
            return message
        name = None if message.name is None else self._filler * len(message.name)
        return replace(message, content=self._text(message.content), name=name)

    def options(self, options: ChatOptions) -> ChatOptions:
        """The options with the strings among the template's variables made harmless."""
        variables = {
            name: self._text(value) if isinstance(value, str) else value for name, value in options.variables.items()
        }
        return replace(options, variables=variables)

    def _text(self, text: str) -> str:
        inner = text.strip()
        if inner and any(inner in token for token in self._tokens):
            text = text.replace(inner, self._filler * len(inner))
        return text.translate(self._harmless)


def _unused_marks(messages: Sequence[ChatMessage]) -> tuple[str, str, str]:
    """Three marks that no message has: the start and the end of a fence, and where an open message is cut."""
    unused = [mark for mark in _MARKS if not any(mark in message.content for message in messages)]
    if len(unused) < 3:
        raise PromptError("The messages use every Unicode noncharacter from U+FDD0 to U+FDEF.", param="messages")
    return unused[0], unused[1], unused[2]


def _open_end(text: str, cut: str) -> str:
    """The text up to where the last message ends, which `cut` and a space mark.

    When the template trims messages the space is gone; then the end of this message is trimmed, as transformers does.
    """
    before, mark, after = text.rpartition(cut)
    if not mark:
        message = "The model's chat template does not show the last message as it is, so it can't be continued."
        raise PromptError(message, param="messages")
    return before if after.startswith(" ") else before.rstrip()
