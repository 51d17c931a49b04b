"""Tells the metrics what `admission` does: who waits, for how long, and who was refused."""

from __future__ import annotations

from collections import Counter

from serve_app.access.admission import Admission
from serve_app.core import Priority
from serve_app.observability.metrics import EXPECTED_WAIT_S, QUEUED, REFUSALS, MetricsSink


class AdmissionMetrics:
    """The metrics of one ingress."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._told: Counter[str] = Counter()

    def report(self, metrics: MetricsSink) -> None:
        """Tell what is there now, and what has happened since the last call."""
        waiting = self._admission.waiting()
        for priority in Priority:
            metrics.gauge(QUEUED, waiting[priority], {"priority": priority})
        metrics.gauge(EXPECTED_WAIT_S, self._admission.expected_wait_s())
        refused = Counter(self._admission.refused)
        for reason, number in (refused - self._told).items():
            metrics.count(REFUSALS, number, {"reason": reason})
        self._told = refused
