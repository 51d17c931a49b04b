"""What the metrics tell of the attempts of an ingress."""

from __future__ import annotations

from fake_replica import generation_request
from memory_metrics import MemoryMetrics

from serve_app.access.entry import Entry, Group
from serve_app.core import GenerationStats
from serve_app.deployments.dispatch.attempt_metrics import AttemptMetrics


def test_waits_and_losses_are_told_once() -> None:
    metrics, attempts = MemoryMetrics(), AttemptMetrics()
    for tenant, placed_at in (("alice", 12.5), ("", 10.0), ("refused", None)):
        attempts.ended(Entry(generation_request(tenant=tenant), Group(), 10.0, placed_at=placed_at))
    attempts.ended(Entry(None, Group(), 10.0, placed_at=11.0))
    attempts.begun(GenerationStats(queued_s=0.25, prefill_s=0.5))
    attempts.lost()
    attempts.lost()
    attempts.moved()
    for _ in range(2):
        attempts.report(metrics)
    assert metrics.observations == {
        ("serve_app_admission_wait_seconds", ("alice",)): [2.5],
        ("serve_app_admission_wait_seconds", ("-",)): [0.0],
        ("serve_app_request_queue_time_seconds", ()): [0.25],
        ("serve_app_request_prefill_time_seconds", ()): [0.5],
    }
    assert metrics.counters["serve_app_failovers", ()] == 2
    assert metrics.counters["serve_app_moves", ()] == 1
