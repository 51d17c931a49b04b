"""The service's metrics: their names, meanings and labels, and the small interface that records them.

Promises that a metric is declared once, here. Knows no Ray and no other room: deployments give the real sink.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

NO_TAGS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric as the metrics endpoint shows it."""

    name: str
    description: str
    tag_keys: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()
    """Upper bounds of a histogram's buckets, in the metric's unit."""


_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)

REQUESTS = Metric(
    "serve_app_requests",
    "Requests ended, by endpoint and outcome (stop, length, disconnected, or an error's code).",
    ("endpoint", "outcome"),
)
KEY_REQUESTS = Metric(
    "serve_app_key_requests",
    "Requests ended, by the tenant and the name of the API key, and by outcome. None where the service takes no keys.",
    ("tenant", "key", "outcome"),
)
KEY_TOKENS = Metric(
    "serve_app_key_tokens",
    "Tokens of accepted requests, by the tenant and the name of the API key, and by kind: prompt or output.",
    ("tenant", "key", "kind"),
)
PROMPT_TOKENS = Metric("serve_app_prompt_tokens", "Prompt tokens of accepted requests.")
CACHED_PROMPT_TOKENS = Metric("serve_app_prefix_cache_hits", "Prompt tokens that were found in the KV cache.")
OUTPUT_TOKENS = Metric("serve_app_generation_tokens", "Tokens generated for clients.")
TIME_TO_FIRST_TOKEN_S = Metric(
    "serve_app_time_to_first_token_seconds",
    "Seconds from the request's arrival at the ingress to its first token.",
    ("endpoint",),
    _SECONDS,
)
INTER_TOKEN_LATENCY_S = Metric(
    "serve_app_inter_token_latency_seconds",
    "Mean seconds between the tokens of a request, observed once as it ends.",
    ("endpoint",),
    _SECONDS,
)
E2E_LATENCY_S = Metric(
    "serve_app_e2e_request_latency_seconds",
    "Seconds from a request's arrival at the ingress to its end, of requests that got a token.",
    ("endpoint",),
    _SECONDS,
)
ADMISSION_WAIT_S = Metric(
    "serve_app_admission_wait_seconds",
    "Seconds that a request waited in an ingress replica for a place at a model replica, by tenant.",
    ("tenant",),
    _SECONDS,
)
QUEUE_TIME_S = Metric(
    "serve_app_request_queue_time_seconds",
    "Seconds that a request waited in a model replica's engine for its first step.",
    boundaries=_SECONDS,
)
PREFILL_TIME_S = Metric(
    "serve_app_request_prefill_time_seconds",
    "Seconds from a request's first step in the engine to its first token.",
    boundaries=_SECONDS,
)
FAILOVERS = Metric(
    "serve_app_failovers", "Answers that another model replica had to continue, because theirs died or fell silent."
)
MOVES = Metric("serve_app_moves", "Answers that another model replica continued, because theirs was to leave.")
IGNORED_FIELDS = Metric("serve_app_ignored_fields", "Fields of requests that the service does not know and ignored.")
REQUESTS_IN_PROGRESS = Metric("serve_app_requests_in_progress", "Requests that an ingress replica is answering.")
QUEUED = Metric(
    "serve_app_queued", "Requests that wait in an ingress replica for a place, by class (priority).", ("priority",)
)
EXPECTED_WAIT_S = Metric(
    "serve_app_expected_wait_seconds",
    "Seconds that a new request of a tenant without others would wait in an ingress replica.",
)
REFUSALS = Metric(
    "serve_app_refusals",
    "Requests refused because they would not start in time, by reason: full, over_share, or late (it had waited).",
    ("reason",),
)
LIMITED_REQUESTS = Metric(
    "serve_app_limited_requests",
    "Requests refused by a limit of their key or tenant, by tenant and by what the limit counts (requests, tokens, "
    "tokens_day, streams).",
    ("tenant", "limit"),
)
UNLIMITED_REQUESTS = Metric(
    "serve_app_unlimited_requests",
    "Requests of callers with limits that went on unlimited, because the store that counts could not be reached.",
)
RUNNING = Metric("serve_app_num_requests_running", "Requests that a model replica computes in its steps.")
WAITING = Metric("serve_app_num_requests_waiting", "Requests that wait for a place in a model replica's engine.")
CACHE_USE = Metric("serve_app_kv_cache_usage_perc", "Share of the KV cache's pages in use, 0 to 1.")
PREEMPTIONS = Metric(
    "serve_app_num_preemptions", "Requests whose place or KV cache a model replica gave to others for a while."
)
STEPS = Metric(
    "serve_app_steps",
    "Steps of a model replica's engine, by phase: decode, or prefill for those that compute prompts too.",
    ("phase",),
)
STEP_TIME_S = Metric("serve_app_step_time_seconds", "Seconds that these steps took together, by phase.", ("phase",))
JOURNALS = Metric("serve_app_journals", "Journals of resumable streams that are kept, in the whole application.")
JOURNAL_BYTES = Metric("serve_app_journal_bytes", "Bytes of all these journals together.")
RESPONSES = Metric("serve_app_responses", "Responses of /v1/responses that are kept, in the whole application.")
RESPONSE_BYTES = Metric("serve_app_response_bytes", "Bytes of all these responses together.")
DRAFTED_TOKENS = Metric(
    "serve_app_drafted_tokens", "Output tokens that prompt lookup guessed and a model replica verified."
)
ACCEPTED_TOKENS = Metric(
    "serve_app_accepted_tokens", "Of the guessed tokens, those that were right: each saved a step."
)

METRICS = tuple(value for value in tuple(globals().values()) if isinstance(value, Metric))
"""All of them."""


class MetricsSink(Protocol):
    """Where values go. Called from one event loop; must be cheap and must not raise."""

    def count(self, metric: Metric, value: float, tags: Mapping[str, str] = NO_TAGS) -> None:
        """Add `value` to a counter."""
        ...

    def gauge(self, metric: Metric, value: float, tags: Mapping[str, str] = NO_TAGS) -> None:
        """Set a gauge."""
        ...

    def observe(self, metric: Metric, value: float, tags: Mapping[str, str]) -> None:
        """Record one value of a histogram."""
        ...
