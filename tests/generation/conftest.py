"""What the tests of generations share."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from simulated_time import simulated_time


@pytest.fixture
async def exact_time() -> AsyncIterator[None]:
    """The loop's time is simulated: what is to take 50 ms takes just that, whatever else the machine does."""
    with simulated_time():
        yield
