"""Reads a text that comes in pieces: what the parsers of answers are made of.

A parser is a generator (`Steps`) that yields whenever it needs more text. Promises that what it reads depends on the
text alone, never on the pieces, and that the cost is linear in the text. Knows no format.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from typing import TypeAlias, TypeVar

T = TypeVar("T")
Steps: TypeAlias = Generator[None, None, T]
"""A reading in progress. It yields to wait for more text, and returns what it read."""
Tell: TypeAlias = Callable[[str], None]
"""Takes the next piece of something."""

_SPACE = re.compile(r"\s*")


class Marks:
    """Strings to look for in a text. None of them begins with another."""

    def __init__(self, *marks: str) -> None:
        self._marks = marks
        self._pattern = re.compile("|".join(map(re.escape, marks)) or r"(?!)")
        self._longest = max(map(len, marks), default=1)

    def search(self, text: str, at: int) -> re.Match[str] | None:
        """The first mark from `at` on."""
        return self._pattern.search(text, at)

    def certain(self, text: str, at: int) -> int:
        """Up to where the text, which holds no whole mark, can't become one: its rest begins a mark, or is empty."""
        for start in range(max(at, len(text) - self._longest + 1), len(text)):
            rest = text[start:]
            if any(mark.startswith(rest) for mark in self._marks):
                return start
        return len(text)


class Reader:
    """The text so far, up to where it was read."""

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._held: list[str] | None = None
        self.ended = False
        """No more text comes. Set by the owner."""

    def feed(self, text: str) -> None:
        """More text came."""
        self._text = self._text[self._at :] + text
        self._at = 0

    def hold(self, before: str = "") -> None:
        """Keep `before` and all that is read from now on, until `release`."""
        self._held = [before]

    def release(self) -> str:
        """What was read since `hold`; "" without one."""
        held, self._held = self._held, None
        return "".join(held or ())

    def rest(self) -> str:
        """All of the unread text, which is read now."""
        return self._take(len(self._text))

    def peek(self) -> Steps[str]:
        """The next character, which stays unread; "" at the end."""
        while self._at == len(self._text):
            if self.ended:
                return ""
            yield
        return self._text[self._at]

    def next(self) -> Steps[str]:
        """The next character; "" at the end."""
        if not (yield from self.peek()):
            return ""
        return self._take(self._at + 1)

    def has(self, literal: str) -> Steps[bool]:
        """Whether `literal` comes next. If so it is read, else nothing is."""
        while True:
            if self._text.startswith(literal, self._at):
                self._take(self._at + len(literal))
                return True
            if self.ended or not literal.startswith(self._text[self._at : self._at + len(literal)]):
                return False
            yield

    def cut_off(self, *literals: str) -> bool:
        """Whether the text ended where one of these could have come, or inside it."""
        rest = self._text[self._at :]
        return self.ended and any(literal.startswith(rest) for literal in literals)

    def one_of(self, *literals: str) -> Steps[str]:
        """The first of these that comes next, which is read; "" if none does."""
        for literal in literals:
            if (yield from self.has(literal)):
                return literal
        return ""

    def run(self, pattern: re.Pattern[str]) -> Steps[str]:
        """The run of characters that comes next. `pattern`: a class of characters with a star, as `[a-z]*`."""
        pieces: list[str] = []
        while True:
            found = pattern.match(self._text, self._at)
            pieces.append(self._take(found.end() if found else self._at))
            if self._at < len(self._text) or self.ended:
                return "".join(pieces)
            yield

    def space(self) -> Steps[str]:
        """The whitespace that comes next, if any."""
        return (yield from self.run(_SPACE))

    def until(self, marks: Marks, tell: Tell) -> Steps[str]:
        """Read up to the first of the marks, and the mark, which is returned; "" if the text ends before.

        `tell` gets the text before it, as soon as it is certain.
        """
        while True:
            if found := marks.search(self._text, self._at):
                if found.start() > self._at:
                    tell(self._take(found.start()))
                return self._take(found.end())
            certain = len(self._text) if self.ended else marks.certain(self._text, self._at)
            if certain > self._at:
                tell(self._take(certain))
            if self.ended:
                return ""
            yield

    def _take(self, end: int) -> str:
        piece = self._text[self._at : end]
        self._at = end
        if self._held is not None:
            self._held.append(piece)
        return piece
