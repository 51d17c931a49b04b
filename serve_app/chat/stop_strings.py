"""Cuts a stream of text at the first stop string.

Promises that no part of a stop string that was reached is ever emitted, that nothing else is lost, and that the result
does not depend on how the text was cut into pushes. Knows no tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from serve_app.chat.prompt_error import PromptError


class StopStrings:
    """The text ends before the stop string that is complete first.

    So a short stop string inside a longer one wins, as its last character comes first; of those complete at the same
    character the longest wins, so that nothing of it is shown. One Knuth-Morris-Pratt automaton per stop string: the
    cost of a character does not grow with the length of the stop strings, whatever they are.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises `PromptError` for an empty stop string."""
        if not all(stops):
            raise PromptError("A stop string must not be empty.", param="stop")
        self._stops = [(stop, _failure_table(stop)) for stop in dict.fromkeys(stops)]
        self._matched = [0] * len(self._stops)
        """For each stop string, how many of its first characters the text ends with."""
        self._held = ""
        self.hit: str | None = None
        """The stop string that was reached."""

    def push(self, text: str, *, may_stop: bool = True) -> tuple[str, bool]:
        """Text that is certain to be shown, and whether a stop string was reached (then it is the last).

        `may_stop` False: a stop string that this text completes is text like any other.
        """
        if self.hit is not None:
            return "", True
        if not self._stops:
            return text, False
        available = self._held + text
        for end, character in enumerate(text, start=len(self._held) + 1):
            longest = self._advance(character)
            if longest and may_stop:
                self.hit = available[end - longest : end]
                self._held = ""
                return available[: end - longest], True
        certain = len(available) - max(self._matched)
        self._held = available[certain:]
        return available[:certain], False

    def flush(self) -> str:
        """The text ended: what was held back, since it is no stop string after all."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return held

    def _advance(self, character: str) -> int:
        """The length of the longest stop string that this character completes, or 0."""
        longest = 0
        for index, (stop, failure) in enumerate(self._stops):
            matched = self._matched[index]
            while matched and stop[matched] != character:
                matched = failure[matched - 1]
            if stop[matched] == character:
                matched += 1
            if matched == len(stop):
                longest = max(longest, matched)
                matched = failure[matched - 1]  # needed only where this stop string does not end the text
            self._matched[index] = matched
        return longest


@lru_cache(maxsize=64)
def _failure_table(stop: str) -> tuple[int, ...]:
    """table[i]: the length of the longest proper prefix of stop that is also a suffix of stop[: i + 1].

    Cached, because all choices of a request need the same: 32 choices with 16 stop strings of 1,000 characters would
    cost 0.1 s.
    """
    table = [0] * len(stop)
    matched = 0
    for index in range(1, len(stop)):
        while matched and stop[index] != stop[matched]:
            matched = table[matched - 1]
        if stop[index] == stop[matched]:
            matched += 1
        table[index] = matched
    return tuple(table)
