"""The service's metrics: their names, meanings and labels, and the small interface that records them.

Promises that a metric is declared once, here. Knows no Ray and no other room: deployments give the real sink.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Protocol

NO_TAGS: Mapping[str, str] = MappingProxyType({})


class MetricKind(StrEnum):
    """How values of a metric add up."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric as the metrics endpoint shows it."""

    name: str
    kind: MetricKind
    description: str
    tag_keys: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()
    """Upper bounds of a histogram's buckets, in the metric's unit."""


_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)

REQUESTS = Metric(
    "serve_app_requests",
    MetricKind.COUNTER,
    "Requests ended, by endpoint and outcome (stop, length, disconnected, or an error's code).",
    ("endpoint", "outcome"),
)
PROMPT_TOKENS = Metric("serve_app_prompt_tokens", MetricKind.COUNTER, "Prompt tokens of accepted requests.")
CACHED_PROMPT_TOKENS = Metric(
    "serve_app_cached_prompt_tokens", MetricKind.COUNTER, "Prompt tokens that were found in the KV cache."
)
OUTPUT_TOKENS = Metric("serve_app_output_tokens", MetricKind.COUNTER, "Tokens generated for clients.")
TIME_TO_FIRST_TOKEN_S = Metric(
    "serve_app_time_to_first_token_s",
    MetricKind.HISTOGRAM,
    "Seconds from the request's arrival at the ingress to its first token.",
    ("endpoint",),
    _SECONDS,
)
INTER_TOKEN_LATENCY_S = Metric(
    "serve_app_inter_token_latency_s",
    MetricKind.HISTOGRAM,
    "Mean seconds between the tokens of a request, observed once as it ends.",
    ("endpoint",),
    _SECONDS,
)
REQUESTS_IN_PROGRESS = Metric(
    "serve_app_requests_in_progress", MetricKind.GAUGE, "Requests that an ingress replica is answering."
)
RUNNING = Metric("serve_app_running", MetricKind.GAUGE, "Requests that a model replica computes in its steps.")
WAITING = Metric("serve_app_waiting", MetricKind.GAUGE, "Requests that wait for a place in a model replica's engine.")
CACHE_USE = Metric("serve_app_cache_use", MetricKind.GAUGE, "Share of the KV cache's pages in use, 0 to 1.")
JOURNALS = Metric(
    "serve_app_journals", MetricKind.GAUGE, "Journals of resumable streams that are kept, in the whole application."
)
JOURNAL_BYTES = Metric("serve_app_journal_bytes", MetricKind.GAUGE, "Bytes of all these journals together.")
DRAFTED_TOKENS = Metric(
    "serve_app_drafted_tokens",
    MetricKind.COUNTER,
    "Output tokens that prompt lookup guessed and a model replica verified.",
)
ACCEPTED_TOKENS = Metric(
    "serve_app_accepted_tokens", MetricKind.COUNTER, "Of the guessed tokens, those that were right: each saved a step."
)

METRICS = (
    REQUESTS,
    PROMPT_TOKENS,
    CACHED_PROMPT_TOKENS,
    OUTPUT_TOKENS,
    TIME_TO_FIRST_TOKEN_S,
    INTER_TOKEN_LATENCY_S,
    REQUESTS_IN_PROGRESS,
    RUNNING,
    WAITING,
    CACHE_USE,
    JOURNALS,
    JOURNAL_BYTES,
    DRAFTED_TOKENS,
    ACCEPTED_TOKENS,
)


class MetricsSink(Protocol):
    """Where values go. Called from one event loop; must be cheap and must not raise."""

    def count(self, metric: Metric, value: float = 1, tags: Mapping[str, str] = NO_TAGS) -> None:
        """Add `value` to a counter."""
        ...

    def gauge(self, metric: Metric, value: float, tags: Mapping[str, str] = NO_TAGS) -> None:
        """Set a gauge."""
        ...

    def observe(self, metric: Metric, value: float, tags: Mapping[str, str] = NO_TAGS) -> None:
        """Record one value of a histogram."""
        ...


class MemoryMetrics:
    """A sink that keeps everything in memory, for tests and for running without Ray."""

    def __init__(self) -> None:
        self.counters: defaultdict[tuple[str, tuple[str, ...]], float] = defaultdict(float)
        """(name, tag values in the order of `tag_keys`) -> sum."""
        self.gauges: dict[tuple[str, tuple[str, ...]], float] = {}
        self.observations: defaultdict[tuple[str, tuple[str, ...]], list[float]] = defaultdict(list)

    def count(self, metric: Metric, value: float = 1, tags: Mapping[str, str] = NO_TAGS) -> None:
        """See `MetricsSink`. Raises `KeyError` for a metric that lacks a tag."""
        self.counters[_key(metric, tags)] += value

    def gauge(self, metric: Metric, value: float, tags: Mapping[str, str] = NO_TAGS) -> None:
        """See `MetricsSink`. Raises `KeyError` for a metric that lacks a tag."""
        self.gauges[_key(metric, tags)] = value

    def observe(self, metric: Metric, value: float, tags: Mapping[str, str] = NO_TAGS) -> None:
        """See `MetricsSink`. Raises `KeyError` for a metric that lacks a tag."""
        self.observations[_key(metric, tags)].append(value)


def _key(metric: Metric, tags: Mapping[str, str]) -> tuple[str, tuple[str, ...]]:
    return metric.name, tuple(tags[key] for key in metric.tag_keys)
