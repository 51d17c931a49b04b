"""The service's metrics on Ray's metrics endpoint.

Promises that recording is cheap: an instrument is made once, at its first value. Serve adds the application,
deployment and replica as labels; Ray adds the prefix `ray_`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from ray.serve.metrics import Counter, Gauge, Histogram

from serve_app.observability.metrics import NO_TAGS, Metric


class RayMetrics:
    """An `observability.metrics.MetricsSink` of this Serve replica."""

    def __init__(self) -> None:
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        self._histograms: dict[str, Histogram] = {}
        self._set: dict[str, float] = {}
        """By gauge: what it was set to last."""

    def count(self, metric: Metric, value: float, tags: Mapping[str, str] = NO_TAGS) -> None:
        """Add `value` to a counter; nothing when it is 0, which Ray refuses."""
        if metric.name not in self._counters:
            self._counters[metric.name] = Counter(metric.name, metric.description, _keys(metric))
        if value > 0:
            self._counters[metric.name].inc(value, dict(tags))

    def gauge(self, metric: Metric, value: float, tags: Mapping[str, str] = NO_TAGS) -> None:
        """Set a gauge."""
        if metric.name not in self._gauges:
            self._gauges[metric.name] = Gauge(metric.name, metric.description, _keys(metric))
        self._gauges[metric.name].set(value, dict(tags))
        if not tags:
            self._set[metric.name] = value

    def repeat(self, metric: Metric) -> None:
        """Set a gauge without tags, if it was ever set, to what it was set to last: Ray forgets one after a while."""
        if metric.name in self._set:
            self._gauges[metric.name].set(self._set[metric.name])

    def observe(self, metric: Metric, value: float, tags: Mapping[str, str]) -> None:
        """Record one value of a histogram."""
        if metric.name not in self._histograms:
            boundaries = list(metric.boundaries)
            self._histograms[metric.name] = Histogram(metric.name, metric.description, boundaries, _keys(metric))
        self._histograms[metric.name].observe(value, dict(tags))


def _keys(metric: Metric) -> tuple[str]:
    return cast("tuple[str]", metric.tag_keys)  # any number of them; Ray's annotation means the same
