"""Pauses between attempts, of the server and of the client, which shares no code with it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from serve_app import backoff
from serve_app.client import ConnectionLost, protocol

CLIENT_BACKOFF_S = partial(protocol.backoff_s, ConnectionLost("the server asks for no pause"))


@pytest.mark.parametrize("backoff_s", [backoff.backoff_s, CLIENT_BACKOFF_S], ids=["server", "client"])
@pytest.mark.parametrize(
    ("failures", "middle_s"), [(1, 0.1), (2, 0.2), (3, 0.4), (4, 0.8), (5, 1.0), (6, 1.0), (10**6, 1.0)]
)
def test_pauses_double_up_to_the_longest(
    backoff_s: Callable[[int, float, float], float], failures: int, middle_s: float
) -> None:
    pauses_s = [backoff_s(failures, 0.1, 1.0) for _ in range(200)]
    assert all(0.5 * middle_s <= pause_s <= 1.5 * middle_s for pause_s in pauses_s)
    assert len(set(pauses_s)) > 100, "those who failed together must not come back together"
