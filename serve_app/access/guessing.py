"""Slows down whoever tries one key after another: some wrong keys for each address, then a wait.

Promises bounded memory, that a caller whose key was right from that address before is not held up by others there, and
that a program which repeats one wrong key holds nobody up. Knows no HTTP.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

WRONG_KEYS = 10
"""Different wrong keys that an address may present at once."""
PERIOD_S = 6.0
"""After that, one more for each such period: 10 a minute."""
KNOWN_FOR_S = 86_400.0
"""How long a caller is known at an address since its key was last right there."""
MOST_ADDRESSES = 10_000
MOST_KNOWN = 10_000
"""Bounds of memory: about 10 MB together. Beyond them, what was not used for longest is forgotten."""


class TooManyGuesses(Exception):
    """The address has to wait."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(retry_after_s)
        self.retry_after_s = retry_after_s


@dataclass(slots=True)
class _Address:
    """Wrong keys from one address. Their number leaks away."""

    level: float = 0.0
    at: float = 0.0
    last: list[bytes] = field(default_factory=list)
    """Marks of the last wrong keys."""


class Guesses:
    """The wrong keys that one process was given."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: in seconds."""
        self._clock = clock
        self._secret = secrets.token_bytes(16)
        self._addresses: OrderedDict[str | None, _Address] = OrderedDict()
        self._known: OrderedDict[tuple[str, str], float] = OrderedDict()
        """(address, name of the key) -> when it was last right."""

    def right(self, address: str | None, name: str) -> None:
        """The key of this name was presented. Raises `TooManyGuesses` when the address has to wait.

        Else whoever guesses would learn at once which of many keys is right. Where the address is not known (None), it
        may be that of a proxy for everybody: a right key then passes always.
        """
        if address is None:
            return
        now, caller = self._clock(), (address, name)
        known = self._known.get(caller, -math.inf)
        if now - known >= KNOWN_FOR_S:
            self._check(address, now)
        self._known[caller] = now
        self._known.move_to_end(caller)
        if len(self._known) > MOST_KNOWN:
            self._known.popitem(last=False)

    def wrong(self, address: str | None, presented: str) -> None:
        """A key was presented that is none. Raises `TooManyGuesses` when the address has to wait.

        A key that was among the last wrong ones there counts once: its sender has a wrong setting and guesses nothing.
        """
        now = self._clock()
        mark = hmac.digest(self._secret, presented.encode("utf-8", "surrogateescape"), hashlib.sha256)[:8]
        state = self._addresses.get(address)
        if state is not None and mark in state.last:
            return
        self._check(address, now)
        state = self._addresses.setdefault(address, _Address())
        self._addresses.move_to_end(address)
        state.level, state.at = self._level(state, now) + 1, now
        state.last = [*state.last[1 - WRONG_KEYS :], mark]
        if len(self._addresses) > MOST_ADDRESSES:
            self._addresses.popitem(last=False)

    def _check(self, address: str | None, now: float) -> None:
        state = self._addresses.get(address)
        if state is None:
            return
        excess = self._level(state, now) - (WRONG_KEYS - 1)
        if excess > 0:
            raise TooManyGuesses(excess * PERIOD_S)

    def _level(self, state: _Address, now: float) -> float:
        return max(0.0, state.level - (now - state.at) / PERIOD_S)
