"""Reads texts as answers, in any cut."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

from serve_app.chat.answers import AnswerFormat, new_parser
from serve_app.chat.parts import Part, joined

TOOLS = {"get_weather": {"city": True, "days": False}, "now": {}}
"""The tools that the requests of these tests offer: name -> argument -> whether it is a text."""

_DEEP = 1100
"""Levels that Python's own JSON reader refuses with a RecursionError."""
_HARMFUL = (
    *('"\\ud800"', r'"{\"a\": \"\ud800\"}"', '{"a": "\\ud800"}', "'\\ud800'", "9" * 5000, "1e999", "NaN", "\0"),
    *("[" * _DEEP, "[" * _DEEP + "]" * _DEEP, '{"a": ' * _DEEP, json.dumps("[" * _DEEP), "{" * _DEEP, "{a:" * _DEEP),
    *('{"function": ' * _DEEP, '{"tool_calls": [' * _DEEP, "{1:" * _DEEP),
)


def harmed(text: str) -> Iterator[str]:
    """The text with what raises in a reader that trusts the model, in place of names, values and objects."""
    for found in re.finditer(r'"[^"]*"|\bnow\b|Paris|\b3\b|\{.*\}', text):
        for harm in _HARMFUL:
            yield text[: found.start()] + harm + text[found.end() :]


def parts_of(answer: AnswerFormat, pieces: Sequence[str]) -> list[Part]:
    """The parts of a text that comes in these pieces, up to where the answer ends by itself."""
    parser = new_parser(answer)
    parts: list[Part] = []
    for piece in pieces:
        parts += parser.push(piece)
        if parser.ended:
            break
    return joined(parts + parser.flush())


def random_cuts(text: str, number: int, seed: int) -> Iterator[list[str]]:
    """The text in random pieces, each time with another mean size."""
    draw = random.Random(seed)
    for _ in range(number):
        share = draw.choice((0.02, 0.1, 0.3, 0.7))
        bounds = [0, *(index for index in range(1, len(text)) if draw.random() < share), len(text)]
        yield [text[low:high] for low, high in pairwise(bounds)]
