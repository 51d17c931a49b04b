"""Gauges are told again, since Ray forgets those that are left alone."""

from __future__ import annotations

from typing import Any

import pytest

from serve_app.deployments import metrics
from serve_app.deployments.metrics import RayMetrics
from serve_app.observability.metrics import JOURNALS, REQUESTS_IN_PROGRESS


class FakeGauge:
    """Notes what it was set to."""

    told: list[tuple[str, float]]

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self._name = name

    def set(self, value: float, tags: dict[str, str] | None = None) -> None:
        """As Ray's."""
        self.told.append((self._name, value))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setattr(FakeGauge, "told", [], raising=False)
    monkeypatch.setattr(metrics, "Gauge", FakeGauge)
    return FakeGauge.told


def test_a_repeated_gauge_has_its_last_value(told: list[Any]) -> None:
    recorded = RayMetrics()
    recorded.gauge(REQUESTS_IN_PROGRESS, 2)
    recorded.gauge(JOURNALS, 7)
    recorded.gauge(REQUESTS_IN_PROGRESS, 1)
    told.clear()
    recorded.repeat(REQUESTS_IN_PROGRESS)
    assert told == [(REQUESTS_IN_PROGRESS.name, 1)]


def test_a_gauge_that_was_never_set_is_not_made(told: list[Any]) -> None:
    RayMetrics().repeat(REQUESTS_IN_PROGRESS)
    assert told == []
