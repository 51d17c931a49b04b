"""How long to wait before something is tried again. Knows no clock.

The client has the same in `client.protocol`, since it imports nothing of the server.
"""

from __future__ import annotations

import random


def backoff_s(failures: int, first_s: float, longest_s: float) -> float:
    """Seconds to wait after so many failures in a row (from 1): doubling from `first_s` up to `longest_s`.

    Jittered by half each way, so that those who failed together don't come back together.
    """
    return random.uniform(0.5, 1.5) * min(longest_s, first_s * 2.0 ** min(failures - 1, 30))
