"""What the tests of streams share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
from simulated_time import simulated_time
from unlogged_stream_ids import unlogged_stream_ids


@pytest.fixture(autouse=True)
def no_stream_id_is_logged(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In no test, whatever goes wrong in it."""
    with unlogged_stream_ids(monkeypatch):
        yield


@pytest.fixture
async def exact_time() -> AsyncIterator[None]:
    """The loop's time is simulated: what is to take 50 ms takes just that, whatever else the machine does."""
    with simulated_time():
        yield
