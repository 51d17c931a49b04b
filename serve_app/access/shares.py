"""How much of an ingress's work each tenant has, and how much would be its share. Pure: the clock is handed in."""

from __future__ import annotations

import math
from collections import Counter

ACTIVE_S = 60.0
"""A tenant that has asked within this time may ask again: the others leave it a place."""


class Shares:
    """The tenants of one ingress."""

    def __init__(self) -> None:
        self._tokens: Counter[str] = Counter()
        """Tokens of each tenant's requests, of those that wait and of those in their places."""
        self._in_place: Counter[str] = Counter()
        """Requests of each tenant that have places."""
        self._asked: dict[str, tuple[float, float]] = {}
        """Tenants that have asked lately -> their weight, and when it was last."""

    @property
    def several(self) -> bool:
        """More than one tenant has asked lately."""
        return len(self._asked) > 1

    def came(self, tenant: str, weight: float, tokens: int, now: float) -> None:
        """A request of the tenant has come."""
        self._tokens[tenant] += tokens
        self._asked[tenant] = weight, now

    def left(self, tenant: str, tokens: int) -> None:
        """It has ended."""
        _subtract(self._tokens, tenant, tokens)

    def placed(self, tenant: str) -> None:
        """A request of the tenant has a place."""
        self._in_place[tenant] += 1

    def unplaced(self, tenant: str) -> None:
        """It has no place any more."""
        _subtract(self._in_place, tenant, 1)

    def has_too_much(self, tenant: str) -> bool:
        """Others have requests here too, and the tenant's have more of the tokens than its weight allows."""
        if tenant not in self._tokens or len(self._tokens) < 2:
            return False
        share = self._asked[tenant][0] / sum(self._asked[name][0] for name in self._tokens)
        return self._tokens[tenant] > share * self._tokens.total()

    def to_leave(self, tenant: str, weight: float, now: float) -> int:
        """How many places the tenant has to leave free: some, if it has more than its share of those in use, and others
        have asked lately.

        Without that a tenant that asks seldom would wait for a place each time it asks. It needs one, and more if it
        asks more often: the number of its requests varies by about the square root of it.
        """
        if len(self._asked) < 2:
            return 0
        since = now - ACTIVE_S
        self._asked = {name: one for name, one in self._asked.items() if one[1] >= since or name in self._tokens}
        others = sum(other for name, (other, _) in self._asked.items() if name != tenant)
        of_all = self._in_place.total()
        if others == 0 or self._in_place[tenant] <= weight / (weight + others) * of_all:
            return 0
        return 1 + math.ceil(math.sqrt(of_all - self._in_place[tenant]))


def _subtract(counter: Counter[str], name: str, number: int) -> None:
    counter[name] -= number
    if counter[name] <= 0:
        del counter[name]
