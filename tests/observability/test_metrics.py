from __future__ import annotations

import re

import pytest
from memory_metrics import MemoryMetrics

from serve_app.observability import metrics
from serve_app.observability.metrics import PROMPT_TOKENS, REQUESTS, RUNNING, Metric


def test_every_metric_is_declared_once_and_whole() -> None:
    declared = [value for value in vars(metrics).values() if isinstance(value, Metric)]
    assert tuple(declared) == metrics.METRICS
    names = [metric.name for metric in declared]
    assert REQUESTS in declared
    assert len(set(names)) == len(names)
    for metric in declared:
        assert re.fullmatch(r"serve_app_[a-z0-9_]+", metric.name)
        assert metric.description.endswith(".")
        assert not metric.boundaries or metric.name.endswith("_seconds"), "each histogram is of seconds"
        assert list(metric.boundaries) == sorted(set(metric.boundaries))


def test_values_are_kept_by_their_tags() -> None:
    sink = MemoryMetrics()
    sink.count(REQUESTS, 1, {"endpoint": "/stream", "outcome": "stop"})
    sink.count(REQUESTS, 2, {"outcome": "stop", "endpoint": "/stream"})
    sink.count(PROMPT_TOKENS, 5)
    sink.gauge(RUNNING, 3)
    sink.gauge(RUNNING, 2)
    assert sink.counters == {("serve_app_requests", ("/stream", "stop")): 3, ("serve_app_prompt_tokens", ()): 5}
    assert sink.gauges == {("serve_app_num_requests_running", ()): 2}


def test_a_missing_tag_is_an_error() -> None:
    with pytest.raises(KeyError):
        MemoryMetrics().count(REQUESTS, 1, {"endpoint": "/stream"})
