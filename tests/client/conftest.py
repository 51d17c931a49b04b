"""The fake server for the client's tests."""

from collections.abc import Iterator

import pytest
from fake_api import FakeApi, fake_api


@pytest.fixture
def api() -> Iterator[FakeApi]:
    with fake_api() as running:
        yield running
