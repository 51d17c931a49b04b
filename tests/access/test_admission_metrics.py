"""What the metrics tell of those that wait."""

from __future__ import annotations

from fake_replica import generation_request
from memory_metrics import MemoryMetrics

from serve_app.access.admission import Admission
from serve_app.access.admission_metrics import AdmissionMetrics
from serve_app.core import Failure, Priority, SamplingParams


def test_those_that_wait_and_those_that_were_refused_are_told() -> None:
    admission = Admission(clock=lambda: 0.0)
    metrics, told = MemoryMetrics(), AdmissionMetrics(admission)
    admission.capacity.configure(1, shared=False)
    admission.update({"a": 1})
    admission.place(admission.stray(generation_request(max_new_tokens=100)), "a")
    admission.stray(generation_request(max_new_tokens=100, priority=Priority.BATCH))
    for seed in range(4):
        admission.enter(generation_request(max_new_tokens=100, sampling=SamplingParams(seed)))
        told.report(metrics)
    assert metrics.gauges["serve_app_queued", ("interactive",)] == 1
    assert metrics.gauges["serve_app_queued", ("batch",)] == 1
    assert metrics.gauges["serve_app_expected_wait_seconds", ()] == 10.0
    assert metrics.counters["serve_app_refusals", ("full",)] == 3
    assert isinstance(admission.refusal("", 1.0, None), Failure)
