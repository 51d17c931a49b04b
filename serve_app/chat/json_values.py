"""JSON values that callers send inside a chat: schemas of tools, arguments of calls.

Promises that a checked value is small and shallow enough to walk, that every number in it is finite, and that every
text in it, keys included, is valid Unicode. Knows no template.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from serve_app.chat.prompt_error import PromptError
from serve_app.chat.unicode import require_unicode

MAX_DEPTH = 64
"""Objects and lists inside one another. Templates walk them with recursive macros, several Python frames a level."""
MAX_VALUES = 100_000
"""Values (keys not counted) in all that one request's tools, or its calls, hold. One walk takes about 40 ms then."""


class JsonLimit:
    """Checks the values of one request against what it may hold altogether."""

    def __init__(self) -> None:
        self._left = MAX_VALUES

    def check(self, value: Any, param: str) -> None:
        """Raise `PromptError`, which names `param`, unless the value can be walked, written and encoded."""
        self._check(value, param, MAX_DEPTH)

    def _check(self, value: Any, param: str, depth: int) -> None:
        self._left -= 1
        if self._left < 0:
            raise PromptError(f"{param}: one request may hold at most {MAX_VALUES} JSON values there.", param=param)
        if isinstance(value, str):
            require_unicode(value, param)
        elif isinstance(value, float):
            if not math.isfinite(value):
                raise PromptError(f"{param} has a number that is not finite.", param=param)
        elif isinstance(value, Mapping | list):
            if not depth:
                raise PromptError(f"{param} is nested more than {MAX_DEPTH} levels deep.", param=param)
            for item in value:
                if isinstance(value, Mapping):
                    require_unicode(item, param)
                    item = value[item]
                self._check(item, param, depth - 1)


def texts_in(value: Any) -> Iterator[str]:
    """Every text in a value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from texts_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts_in(item)


def with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """The value with every text in it changed, keys included. Keys that `change` makes equal stay apart."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [with_texts(item, change) for item in value]
    if not isinstance(value, Mapping):
        return value
    changed: dict[str, Any] = {}
    repeats: dict[str, int] = {}
    for key, item in value.items():
        new = wanted = change(key)
        while new in changed:
            repeats[wanted] = repeats.get(wanted, 0) + 1
            new = f"{wanted}{repeats[wanted]}"
        changed[new] = with_texts(item, change)
    return changed


def count_values(value: Any) -> int:
    """How many values there are in a value, itself included; keys are not counted."""
    if isinstance(value, Mapping):
        return 1 + sum(map(count_values, value.values()))
    if isinstance(value, list):
        return 1 + sum(map(count_values, value))
    return 1
