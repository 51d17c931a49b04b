"""What every contender is asked: the same chats, as a function of set, concurrency and round.

Promises that no two cells or rounds share more of a prompt than the set says, so that a server's prefix cache helps
only where that is what the set measures. Token counts are those of the demo model.
"""

from __future__ import annotations

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
_RULE_COUNT, _SENTENCE_COUNT = 15, 44
"""These make a system prompt of 600 tokens and a document of 1,200, to within a tenth."""


class Set(StrEnum):
    """A kind of prompt."""

    VARIED = "varied"
    """50 to 80 tokens, all different."""
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


def opening(cell: Cell, turn: str) -> Chat | None:
    """The request that comes before those of a shared set, with the same system prompt; None for other sets."""
    if cell.set is not Set.SHARED:
        return None
    system = _system_prompt(random.Random(f"{cell} {turn}"))
    return [{"role": "system", "content": system}, {"role": "user", "content": "What can you do for me?"}]


def _chat(kind: Set, shared: str, generator: random.Random) -> Chat:
    question = generator.choice(_TASKS).format(*_fillings(generator)[1:])
    if kind is Set.VARIED:
        return [{"role": "user", "content": question}]
    if kind is Set.SHARED:
        return [{"role": "system", "content": shared}, {"role": "user", "content": question}]
    document = " ".join(generator.choice(_SENTENCES).format(*_fillings(generator)) for _ in range(_SENTENCE_COUNT))
    return [{"role": "user", "content": f"{document}\n\nWhat was said about {generator.choice(SUBJECTS)}?"}]


def _system_prompt(generator: random.Random) -> str:
    rules = [generator.choice(_RULES).format(*_fillings(generator)) for _ in range(_RULE_COUNT)]
    return f"You are assistant number {generator.randrange(10_000)} of a school.\n" + "\n".join(rules)


def _fillings(generator: random.Random) -> tuple[str, str, str, str]:
    first, second = generator.sample(SUBJECTS, 2)
    return str(generator.randrange(10, 1000)), first, second, str(generator.randrange(2, 10))
