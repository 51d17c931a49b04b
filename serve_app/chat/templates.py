"""Messages to ids through the model's own Hugging Face chat template, so that text stays text.

Promises the ids of transformers' `apply_chat_template` for ordinary messages, and that no message adds a control token
to those the template writes. Knows no HTTP.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from serve_app.chat.conversation import ChatMessage
from serve_app.chat.errors import PromptError, TokenizerError
from serve_app.chat.rendering import TemplateMessage, render, try_render
from serve_app.chat.tokenizer import ChatTokenizer, Piece

_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
"""Unicode's noncharacters, kept for internal use: two that the messages lack fence a control token in the text."""
_SENTINEL = "serve_app-probe"


class ChatTemplate:
    """A chat template with the tokenizer it belongs to. Safe to use from any number of threads at once.

    Two defences, since a template is a program that may do anything with a text:

    1. Control tokens in message texts are fenced by marks before the template runs, and what comes out between two
       marks is encoded as text. (transformers' `sanitize_control_tokens` does the same; its form needs a tokenizer
       that threads can't share, so `ChatTokenizer` has two.)
    2. What is not a whole control token in one text can still become one: fields that join ("<|im_" before "end|>"), a
       template that changes case or cuts. So the control ids of the prompt must be those of the same messages made
       harmless; else the request is refused.

    Reasoning models' templates cut `<think>...</think>` out of earlier answers, by string operations that marks would
    disturb. So in the assistant's words non-special control tokens are left alone at first, and fenced only when that
    fails the comparison.
    """

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        """Raises `TokenizerError` when the tokenizer has no template or the template ignores what messages say."""
        if tokenizer.template is None:
            raise TokenizerError("This tokenizer has no chat template.")
        self._tokenizer = tokenizer
        self._template = tokenizer.template
        self._knows_developer = "developer" in self._template
        edges = {edge for token in tokenizer.control_tokens for edge in (token[0], token[-1])}
        edges |= {changed for edge in edges for changed in (edge.lower(), edge.upper())}
        self._filler = next((letter for letter in "xqzjkvwygbpfmhducnrstloaie" if letter not in edges), "x")
        self._harmless = str.maketrans(dict.fromkeys("".join(edges), self._filler))
        self._takes_parts = False
        self._takes_parts = self._needs_parts()

    def encode(self, messages: Sequence[ChatMessage]) -> list[int]:
        """The prompt's ids, up to where the assistant's answer begins.

        Raises `PromptError` when the template refuses the messages or when a text would add a control token.
        """
        if not self._knows_developer:
            messages = [replace(m, role="system") if m.role == "developer" else m for m in messages]
        harmless = [self._disarmed(message) for message in messages]
        if harmless == list(messages):
            return self._encode(messages, lenient=True)
        expected = self._controls(self._encode(harmless, lenient=True))
        for lenient in (True, False):
            ids = self._encode(messages, lenient=lenient)
            if self._controls(ids) == expected:
                return ids
        raise PromptError(
            "The messages contain text that would join into a control token of this model.", param="messages"
        )

    def _encode(self, messages: Sequence[ChatMessage], *, lenient: bool) -> list[int]:
        """`lenient`: let the template see `<think>` in the assistant's own words as it is, to cut or keep it."""
        fenced, start, end = self._fenced(messages, lenient=lenient)
        seen = [self._seen(message) for message in fenced]
        return self._tokenizer.encode_pieces(
            self._split(render(self._template, seen, self._tokenizer.special_tokens), start, end)
        )

    def _fenced(self, messages: Sequence[ChatMessage], *, lenient: bool) -> tuple[list[ChatMessage], str, str]:
        """The messages with marks around their control tokens, and the two marks."""
        start, end = _unused_marks(messages)
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
        return fenced, start, end

    def _split(self, text: str, start: str, end: str) -> list[Piece]:
        """A rendered text at its marks. A mark that the template cut from its partner still parts what it stands in."""
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
            seen = [self._seen(message) for message in probe]
            if _SENTINEL in try_render(self._template, seen, self._tokenizer.special_tokens):
                return takes_parts
        raise TokenizerError("The chat template does not show what a user message says.")

    def _controls(self, ids: list[int]) -> list[int]:
        control_ids = self._tokenizer.control_ids
        return [token_id for token_id in ids if token_id in control_ids]

    def _disarmed(self, message: ChatMessage) -> ChatMessage:
        """The same message, unable to begin or end a control token.

        Not emptied, as templates drop or refuse empty messages, and not replaced, as some look for words in it
        ("/no_think"): only the characters that control tokens begin or end with give way. A text that is the inside of
        a control token ("user" in "<|user|>") gives way wholly, and so does a name.
        """
        text = message.content
        inner = text.strip()
        if inner and any(inner in token for token in self._tokenizer.control_tokens):
            text = text.replace(inner, self._filler * len(inner))
        name = None if message.name is None else self._filler * len(message.name)
        return replace(message, content=text.translate(self._harmless), name=name)


def _unused_marks(messages: Sequence[ChatMessage]) -> tuple[str, str]:
    unused = (mark for mark in _MARKS if not any(mark in message.content for message in messages))
    start, end = next(unused, None), next(unused, None)
    if start is None or end is None:
        raise PromptError("The messages use every Unicode noncharacter from U+FDD0 to U+FDEF.", param="messages")
    return start, end
