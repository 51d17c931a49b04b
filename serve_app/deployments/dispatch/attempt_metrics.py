"""Tells the metrics how the attempts of one ingress went: how long they waited where, and how many were lost.

Values are kept until the next report, so that recording one costs next to nothing.
"""

from __future__ import annotations

from serve_app.access.entry import Entry
from serve_app.core import GenerationStats
from serve_app.observability.logs import NOBODY
from serve_app.observability.metrics import (
    ADMISSION_WAIT_S,
    FAILOVERS,
    MOVES,
    NO_TAGS,
    PREFILL_TIME_S,
    QUEUE_TIME_S,
    MetricsSink,
)


class AttemptMetrics:
    """The attempts of one ingress. Used from its event loop."""

    def __init__(self) -> None:
        self._waited: list[tuple[str, float]] = []
        self._begun: list[GenerationStats] = []
        self._failovers = self._moves = 0

    def begun(self, stats: GenerationStats) -> None:
        """An attempt has its first tokens."""
        self._begun.append(stats)

    def ended(self, entry: Entry) -> None:
        """An attempt is over. One that has had no place is no attempt that waited for one."""
        if entry.request is not None and entry.placed_at is not None:
            self._waited.append((entry.request.tenant, entry.placed_at - entry.came_at))

    def lost(self) -> None:
        """The replica of an attempt died, broke or fell silent."""
        self._failovers += 1

    def moved(self) -> None:
        """The replica of an attempt leaves, and another one goes on."""
        self._moves += 1

    def report(self, metrics: MetricsSink) -> None:
        """Tell what has happened since the last call."""
        for tenant, seconds in self._waited:
            metrics.observe(ADMISSION_WAIT_S, seconds, {"tenant": tenant or NOBODY})
        for stats in self._begun:
            metrics.observe(QUEUE_TIME_S, stats.queued_s, NO_TAGS)
            metrics.observe(PREFILL_TIME_S, stats.prefill_s, NO_TAGS)
        metrics.count(FAILOVERS, self._failovers)
        metrics.count(MOVES, self._moves)
        self._waited, self._begun = [], []
        self._failovers = self._moves = 0
