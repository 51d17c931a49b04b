"""The parts of an answer: what the model says, what it reasons, and the tools it calls.

Promises nothing of how they were found. Knows no wire format and no tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol


class TextPart(NamedTuple):
    """More of the answer's text."""

    text: str


class ReasoningPart(NamedTuple):
    """More of the model's reasoning, without the marks around it."""

    text: str


class CallPart(NamedTuple):
    """A tool call begins."""

    number: int
    """The call's number in its answer, from 0."""
    name: str


class ArgumentsPart(NamedTuple):
    """More of the arguments of a call that has begun: a piece of a JSON object."""

    number: int
    text: str


Part = TextPart | ReasoningPart | CallPart | ArgumentsPart


class AnswerParser(Protocol):
    """Reads the text of one answer as it comes.

    The parts of all `push`es and the `flush`, joined, depend on the text alone and never on how it was cut. No text is
    lost: what a parser does not recognise is text.
    """

    @property
    def in_reasoning(self) -> bool:
        """Whether the text so far ends inside the model's reasoning."""
        ...

    @property
    def ended(self) -> bool:
        """Whether the answer is complete, whatever text may follow: it may have one call, and that is complete."""
        ...

    def push(self, text: str) -> list[Part]:
        """The parts that are certain now."""
        ...

    def flush(self) -> list[Part]:
        """The text ended: the parts that still waited."""
        ...


def joined(parts: Iterable[Part]) -> list[Part]:
    """The same parts with neighbours of one kind made one."""
    merged: list[Part] = []
    for part in parts:
        last = merged[-1] if merged else None
        if isinstance(part, TextPart) and isinstance(last, TextPart):
            merged[-1] = TextPart(last.text + part.text)
        elif isinstance(part, ReasoningPart) and isinstance(last, ReasoningPart):
            merged[-1] = ReasoningPart(last.text + part.text)
        elif isinstance(part, ArgumentsPart) and isinstance(last, ArgumentsPart) and part.number == last.number:
            merged[-1] = ArgumentsPart(part.number, last.text + part.text)
        else:
            merged.append(part)
    return merged
