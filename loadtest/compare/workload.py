"""What every contender is asked: the same chats, as a function of set, concurrency and round.

Promises that no two cells or rounds share more of a prompt than the set says, so that a server's prefix cache helps
only where that is what the set measures: each prompt opens with a number that no other has. Token counts are those of
the demo model.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from enum import StrEnum

from loadtest.prompts import SUBJECTS

_TASKS = (
    "Explain {0} to a ten-year-old who likes {1}.",
    "Write three short paragraphs about {0}, the second of them with an example from everyday life that has to do "
    "with {1}, and end with a question that makes the reader curious to find out more.",
    "What do {0} and {1} have in common? Give {2} points.",
    "Write a short dialogue between two friends who talk about {0} and then, by accident, about {1}.",
)
_RULES = (
    "Rule {0}: when somebody asks about {1}, first say in one sentence what it is, then give an example that has to do "
    "with {2}, and never mention more than {3} numbers in one answer.",
    "Rule {0}: an answer about {1} has at most {3} paragraphs, and the last of them comes back to {2}.",
)
_SENTENCES = (
    "On day {0} of the journey we spoke about {1}, and somebody said that it reminded him of {2}.",
    "In the notes of week {0} there is a drawing of {1} beside a list of {3} things to buy.",
    "Nobody could say why {1} mattered so much to the captain, but {2} came up {3} times that evening.",
    "The letter number {0} asks whether {1} and {2} could be explained to children of {3} years.",
)
SHARED_TOKENS, LONG_TOKENS = 600, 1200
PAIRS = 5
"""Prefixes that a measurement of the shared set asks about one request at a time, cold and then cached."""
_RULE_COUNT, _SENTENCE_COUNT = 15, 44
"""These make a system prompt of 600 tokens and a document of 1,200, to within a tenth."""


class Set(StrEnum):
    """A kind of prompt."""

    VARIED = "varied"
    """55 to 90 tokens, all different."""
    SHARED = "shared"
    """A system prompt of about 600 tokens, the same in all requests of a cell, and a short question of each one's own.
    One request with that system prompt has been answered before the others come."""
    LONG = "long"
    """A document of about 1,200 tokens of each one's own, and a question about it."""


class Reader(StrEnum):
    """How a client takes its answer."""

    UNPACED = "unpaced"
    """As fast as it comes."""
    PACED = "paced"
    """One event each 1/pace seconds at most, as a person reads, through small buffers."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One kind of work, measured as a whole."""

    set: Set
    concurrency: int
    reader: Reader = Reader.UNPACED

    def __str__(self) -> str:
        paced = ", paced" if self.reader is Reader.PACED else ""
        return f"{self.set}, {self.concurrency}{paced}"


Chat = list[dict[str, str]]
"""The `messages` of a request."""


def selection(text: str, concurrency: list[int]) -> dict[str, list[int]]:
    """`varied,long@1+8` as {"varied": concurrency, "long": [1, 8]}. Raises `ValueError`."""
    chosen = {}
    for item in filter(None, text.split(",")):
        name, at, counts = item.partition("@")
        chosen[name] = [int(count) for count in counts.split("+")] if at else concurrency
    return chosen


def cells(sets: dict[str, list[int]], readers: dict[str, list[int]]) -> list[Cell]:
    """Every set at its concurrencies if there are unpaced readers; then the varied set with paced ones at theirs: the
    other sets would say the same about those. Raises `ValueError` for a name that is none."""
    kinds = {Set(name): counts for name, counts in sets.items()}
    ways = {Reader(name): counts for name, counts in readers.items()}
    unpaced = [Cell(kind, count) for kind, counts in kinds.items() for count in counts if Reader.UNPACED in ways]
    return unpaced + [Cell(Set.VARIED, count, Reader.PACED) for count in ways.get(Reader.PACED, [])]


def requests_of(cell: Cell) -> int:
    """How many requests one measurement of it makes; three, one after the other, where one alone would say little."""
    return max(3, cell.concurrency)


def chats(cell: Cell, turn: str) -> list[Chat]:
    """The requests of one measurement; `turn` names the round. Paced readers ask other questions than unpaced ones."""
    generator = random.Random(f"{cell} {turn}")
    shared = _system_prompt(generator) if cell.set is Set.SHARED else ""
    return [_chat(cell.set, shared, generator) for _ in range(requests_of(cell))]


def opening(cell: Cell, turn: str) -> Chat:
    """The request that comes before those of a shared set, with the same system prompt."""
    system = _system_prompt(random.Random(f"{cell} {turn}"))
    return [{"role": "system", "content": system}, {"role": "user", "content": "What can you do for me?"}]


def strangers(cell: Cell, turn: str) -> list[Chat]:
    """What a shared set's requests would be if they shared nothing: each has a system prompt of its own."""
    generator = random.Random(f"strangers {cell} {turn}")
    return [_chat(cell.set, _system_prompt(generator), generator) for _ in range(requests_of(cell))]


def pairs(cell: Cell, turn: str) -> list[tuple[Chat, Chat]]:
    """Two questions about each of `PAIRS` system prompts that nobody has asked about before."""
    generator = random.Random(f"pairs {cell} {turn}")
    systems = [_system_prompt(generator) for _ in range(PAIRS)]
    return [(_chat(cell.set, system, generator), _chat(cell.set, system, generator)) for system in systems]


def fingerprint() -> str:
    """Changes with what is asked: figures of two fingerprints can't stand beside each other."""
    asked = [chats(Cell(kind, 1), "fingerprint") for kind in Set]
    return hashlib.sha256(repr(asked).encode()).hexdigest()[:8]


def _chat(kind: Set, shared: str, generator: random.Random) -> Chat:
    question = f"Question {_number(generator)}: {generator.choice(_TASKS).format(*_fillings(generator)[1:])}"
    if kind is Set.VARIED:
        return [{"role": "user", "content": question}]
    if kind is Set.SHARED:
        return [{"role": "system", "content": shared}, {"role": "user", "content": question}]
    document = " ".join(generator.choice(_SENTENCES).format(*_fillings(generator)) for _ in range(_SENTENCE_COUNT))
    asked = f"What was said about {generator.choice(SUBJECTS)}?"
    return [{"role": "user", "content": f"Document {_number(generator)}: {document}\n\n{asked}"}]


def _system_prompt(generator: random.Random) -> str:
    rules = [generator.choice(_RULES).format(*_fillings(generator)) for _ in range(_RULE_COUNT)]
    return f"You are assistant number {_number(generator)} of a school.\n" + "\n".join(rules)


def _number(generator: random.Random) -> int:
    """One of so many that none comes twice in a comparison."""
    return generator.randrange(10_000_000, 100_000_000)


def _fillings(generator: random.Random) -> tuple[str, str, str, str]:
    first, second = generator.sample(SUBJECTS, 2)
    return str(generator.randrange(10, 1000)), first, second, str(generator.randrange(2, 10))
