"""How long to wait before something is tried again. Knows no clock.

`client.protocol` has its own copy of the formula, since the client imports nothing of the server.
"""

from __future__ import annotations

import random


def backoff_s(failures: int, first_s: float, longest_s: float) -> float:
    """Seconds to wait after `failures` failures in a row (from 1): doubling from `first_s` up to `longest_s`.

    A random factor of 0.5 to 1.5 keeps callers that failed together from trying again together.
    """
    return random.uniform(0.5, 1.5) * min(longest_s, first_s * 2.0 ** min(failures - 1, 30))
