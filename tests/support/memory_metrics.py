"""The metrics of one test."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from serve_app.observability.metrics import NO_TAGS, Metric


class MemoryMetrics:
    """A sink that keeps everything in memory."""

    def __init__(self) -> None:
        self.counters: defaultdict[tuple[str, tuple[str, ...]], float] = defaultdict(float)
        """(name, tag values in the order of `tag_keys`) -> sum."""
        self.gauges: dict[tuple[str, tuple[str, ...]], float] = {}
        self.observations: defaultdict[tuple[str, tuple[str, ...]], list[float]] = defaultdict(list)

    def count(self, metric: Metric, value: float, tags: Mapping[str, str] = NO_TAGS) -> None:
        """Raises `KeyError` for a metric that lacks a tag."""
        self.counters[_key(metric, tags)] += value

    def gauge(self, metric: Metric, value: float, tags: Mapping[str, str] = NO_TAGS) -> None:
        """Raises `KeyError` for a metric that lacks a tag."""
        self.gauges[_key(metric, tags)] = value

    def observe(self, metric: Metric, value: float, tags: Mapping[str, str]) -> None:
        """Raises `KeyError` for a metric that lacks a tag."""
        self.observations[_key(metric, tags)].append(value)


def _key(metric: Metric, tags: Mapping[str, str]) -> tuple[str, tuple[str, ...]]:
    return metric.name, tuple(tags[key] for key in metric.tag_keys)
