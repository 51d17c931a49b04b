"""How long a new request would wait at an ingress for its start. Pure: the clock is handed in."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import islice

from serve_app.access.entry import Entry
from serve_app.access.pace import Pace

START_ANSWER_TOKENS = 128
"""How long an answer is until one has ended, if its request allows as much."""
OUTLOOK_S = 0.05
"""How long an estimate of when the places fall free is used: it costs 0.1 ms, and a refusal should cost less."""
OVERDUE = 0.05
"""A request that has run for as long as was expected of it goes on for this share of that time."""
_SAMPLE = 64
"""Requests over which the average length is taken."""


class Outlook:
    """When the places of an ingress fall free.

    Each does when its request has run for as long as requests take. What waits gets the first of them.
    """

    def __init__(self) -> None:
        self.pace = Pace()
        self._service_s = 0.0
        self._left_s: list[float] = [0.0]
        self._until = -math.inf
        self._basis = (0, False, 0)

    def look(
        self, placed: dict[Entry, None], waiting: Iterable[Entry], others: int, now: float, placements: int
    ) -> None:
        """Estimate anew, if the last estimate is old. `others`: places that other ingresses hold. `placements`: counts
        those that got their places so far.

        An ingress that has no place gets its share of those: half of them, as if there were one other ingress.
        """
        first = list(islice(waiting, _SAMPLE))
        basis = len(placed), bool(first), placements
        if now < self._until and basis == self._basis:
            return
        self._until, self._basis = now + OUTLOOK_S, basis
        s_per_token = self.pace.s_per_token
        sample = [entry.answer_tokens for entry in [*first, *islice(placed, _SAMPLE)]]
        self._service_s = s_per_token * (sum(sample) / len(sample) if sample else START_ANSWER_TOKENS)
        self._left_s = sorted(_left_s(entry, s_per_token, now) for entry in placed)
        if not self._left_s:
            places = max(1, others // 2)
            self._left_s = [self._service_s * (number + 1) / places for number in range(places)]

    def wait_s(self, turn: int) -> float:
        """How long the request waits before which `turn` others get a place."""
        rounds, place = divmod(turn, len(self._left_s))
        return self._left_s[place] + rounds * self._service_s

    @property
    def first_s(self) -> float:
        """When the first place falls free."""
        return self._left_s[0]

    @property
    def requests_per_s(self) -> float:
        """How many start each second."""
        return len(self._left_s) / max(self._service_s, 1e-3)


def _left_s(entry: Entry, s_per_token: float, now: float) -> float:
    takes_s = entry.answer_tokens * s_per_token
    began_at = now if entry.began_at is None else entry.began_at
    return max(began_at + takes_s - now, OVERDUE * takes_s)
