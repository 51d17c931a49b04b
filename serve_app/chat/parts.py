"""The parts of an answer: what the model says, what it reasons, and the tools it calls.

Promises nothing of how they were found. Knows no wire format and no tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
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


def joined(parts: Sequence[Part]) -> list[Part]:
    """The same parts with neighbours of one kind made one. The cost is linear in the text."""
    if len(parts) < 2:  # as with most tokens: 0.14 us
        return list(parts)
    merged: list[Part] = []
    for _, run in groupby(parts, _run_of):
        first, *others = run
        if others and not isinstance(first, CallPart):
            texts = [part.text for part in others if not isinstance(part, CallPart)]
            first = first._replace(text="".join([first.text, *texts]))
        merged.append(first)
    return merged


def _run_of(part: Part) -> tuple[type[Part], int]:
    """Neighbours of which this is equal are of one kind. A call is never beside another one of its number."""
    return type(part), part.number if isinstance(part, CallPart | ArgumentsPart) else 0
