"""Marks that fence control tokens in a caller's texts while a template writes them into a prompt.

A mark is one of Unicode's noncharacters, which are kept for internal use, and one that no text of the chat has.
Promises that no mark is left in the prompt, also where the template writes a text as JSON or as Python would show it.
Knows no template.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Set
from typing import NamedTuple

from serve_app.chat.prompt_error import PromptError
from serve_app.chat.tokenizer import Piece

_FIRST, _LAST = 0xFDD0, 0xFDEF
_SHOWN = r"\\ufd[de][0-9a-f]"
"""A mark as Python's `repr` and JSON in ASCII write it."""
_ANY = re.compile(f"[{chr(_FIRST)}-{chr(_LAST)}]|{_SHOWN}")


class Marks(NamedTuple):
    """The marks of one prompt."""

    start: str
    end: str
    """Around a control token that is text."""
    cut: str
    """Where a message is left open."""

    def fenced(self, text: str, tokens: re.Pattern[str] | None) -> str:
        """The text with marks around each match of `tokens`."""
        if tokens is None:
            return text
        # A function, since `re` looks a replacement text up by a hash of the whole pattern: 60 us for 815 tokens.
        return tokens.sub(lambda match: f"{self.start}{match[0]}{self.end}", text)

    def plain(self, text: str) -> str:
        """A rendered text with marks that were written as escapes made characters again."""
        for mark in self:
            text = text.replace(_escape(mark), mark)
        return text

    def split(self, text: str, tokens: Set[str]) -> list[Piece]:
        """Splits a rendered text at its marks, also at a mark whose partner the template has cut away."""
        first, *rest = text.split(self.start)
        pieces = [Piece(part, literal=False) for part in first.split(self.end)]
        for stretch in rest:
            token, mark, tail = stretch.partition(self.end)
            if mark and token in tokens:
                pieces.append(Piece(token, literal=True))
                stretch = tail
            pieces += [Piece(part, literal=False) for part in stretch.split(self.end)]
        return pieces

    def open_end(self, text: str) -> str:
        """The text up to where the last message ends, which `cut` and a space mark.

        When the template trims messages the space is gone; then the end of this message is trimmed, as transformers
        does.
        """
        before, mark, after = text.rpartition(self.cut)
        if not mark:
            message = "The model's chat template does not show the last message as it is, so it can't be continued."
            raise PromptError(message, param="messages")
        return before if after.startswith(" ") else before.rstrip()


def unused_marks(texts: Iterable[str]) -> Marks:
    """Marks that no text has, in no spelling. Raises `PromptError` when three are not left."""
    used: set[str] = set()
    for text in texts:
        used.update(_ANY.findall(text))
    free = (mark for mark in map(chr, range(_FIRST, _LAST + 1)) if mark not in used and _escape(mark) not in used)
    three = [mark for mark, _ in zip(free, range(3), strict=False)]
    if len(three) < 3:
        raise PromptError("The messages use every Unicode noncharacter from U+FDD0 to U+FDEF.", param="messages")
    return Marks(*three)


def alternatives(tokens: Iterable[str]) -> re.Pattern[str] | None:
    """Matches the longest token at a place; None for no tokens."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _escape(mark: str) -> str:
    return f"\\u{ord(mark):04x}"
