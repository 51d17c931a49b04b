"""What an operator watches, as queries of Prometheus: the panels of the dashboard, and the alerts.

The one source of `configs/observe/` (`python scripts/observe.py --write`). A test compares the names with the list of
metrics, and asks a running service for every one of them.
"""

from __future__ import annotations

from dataclasses import dataclass

WINDOW = "2m"
"""Over which rates are taken: values change every 10 s, and Prometheus needs several in a window."""


@dataclass(frozen=True, slots=True)
class Query:
    """One family of curves."""

    expression: str
    legend: str
    """In Grafana's form: `{{label}}` is a label's value."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart."""

    title: str
    unit: str
    """Grafana's name of the unit."""
    queries: tuple[Query, ...]
    about: str


@dataclass(frozen=True, slots=True)
class Alert:
    """What somebody should be told of."""

    name: str
    expression: str
    lasts: str
    """For how long it must be so."""
    severity: str
    summary: str
    remedy: str


def _rate(name: str, by: str = "") -> str:
    grouped = f" by ({by})" if by else ""
    return f"sum{grouped} (rate({name}[{WINDOW}]))"


def _quantile(share: float, name: str, by: str = "") -> str:
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({share}, sum by ({labels}) (rate({name}_bucket[{WINDOW}])))"


def _quantiles(name: str) -> tuple[Query, ...]:
    return tuple(Query(_quantile(share, name), f"p{share * 100:g}") for share in (0.5, 0.9, 0.99))


def _or_none(expression: str) -> str:
    """0 while the counter has never been raised: until then there is no such series."""
    return f"{expression} or vector(0)"


PANELS: tuple[Panel, ...] = (
    Panel(
        "Requests",
        "reqps",
        (Query(_rate("serve_app_requests_total", "outcome"), "{{outcome}}"),),
        "Requests that ended, by outcome: a finish reason, or an error's code.",
    ),
    Panel(
        "Tokens",
        "short",
        (
            Query(_rate("serve_app_generation_tokens_total"), "generated"),
            Query(_rate("serve_app_prompt_tokens_total"), "of prompts"),
            Query(_or_none(_rate("serve_app_prefix_cache_hits_total")), "of prompts, found in the cache"),
        ),
        "Tokens a second, of the whole service.",
    ),
    Panel(
        "Time to first token",
        "s",
        _quantiles("serve_app_time_to_first_token_seconds"),
        "From a request's arrival to its first token.",
    ),
    Panel(
        "Time between tokens",
        "s",
        _quantiles("serve_app_inter_token_latency_seconds"),
        "The mean of each request, over the requests.",
    ),
    Panel(
        "Requests in progress",
        "short",
        (
            Query("sum (serve_app_num_requests_running)", "computed"),
            Query("sum (serve_app_num_requests_waiting)", "waiting in a replica"),
            Query("sum (serve_app_queued)", "waiting in an ingress"),
        ),
        "Where the requests are.",
    ),
    Panel(
        "KV cache in use",
        "percentunit",
        (Query("max by (replica) (serve_app_kv_cache_usage_perc)", "{{replica}}"),),
        "Near 1 with requests that wait: the replica needs more memory, or shorter contexts.",
    ),
    Panel(
        "Wait for a place, by tenant",
        "s",
        (Query(_quantile(0.99, "serve_app_admission_wait_seconds", "tenant"), "{{tenant}}, p99"),),
        "Until a model replica takes the request.",
    ),
    Panel(
        "Refused",
        "reqps",
        (
            Query(_or_none(_rate("serve_app_refusals_total", "reason")), "{{reason}}"),
            Query(_or_none(_rate("serve_app_limited_requests_total", "tenant")), "a limit of {{tenant}}"),
        ),
        "Requests that would not start in time, and those over the limits of their key or tenant.",
    ),
    Panel(
        "Failovers, moves, preemptions",
        "short",
        (
            Query(_or_none(_rate("serve_app_failovers_total")), "failovers"),
            Query(_or_none(_rate("serve_app_moves_total")), "moves"),
            Query(_or_none(_rate("serve_app_num_preemptions_total")), "preemptions"),
        ),
        "A second. Clients see a pause at most.",
    ),
    Panel(
        "Time of a step",
        "s",
        (
            Query(
                f"{_rate('serve_app_step_time_seconds_total', 'phase')} / {_rate('serve_app_steps_total', 'phase')}",
                "{{phase}}",
            ),
        ),
        "Mean time of the engine's steps: with prompts (prefill), and without (decode).",
    ),
)

ALERTS: tuple[Alert, ...] = (
    Alert(
        "ServeAppErrors",
        _rate('serve_app_requests_total{outcome=~"internal_error|engine_failed|replica_lost"}') + " > 0",
        "2m",
        "critical",
        "Requests end with errors of the service.",
        "Look for the request's id in the logs (docs/operations.md, Logs).",
    ),
    Alert(
        "ServeAppFailovers",
        "increase(serve_app_failovers_total[10m]) > 3",
        "0m",
        "warning",
        "Model replicas die or fall silent. Their answers go on elsewhere.",
        "`serve status` and the log of the replica say why.",
    ),
    Alert(
        "ServeAppRefuses",
        f"{_rate('serve_app_refusals_total')} > 0",
        "5m",
        "warning",
        "The service is full, and refuses requests that would not start in time.",
        "More replicas (model_server.num_replicas), or limits for the tenants that ask most.",
    ),
    Alert(
        "ServeAppSlowFirstToken",
        f"{_quantile(0.99, 'serve_app_time_to_first_token_seconds')} > 10",
        "5m",
        "warning",
        "One first token in a hundred takes more than 10 s.",
        "Compare the wait for a place, the queue and the prefill time on the dashboard.",
    ),
    Alert(
        "ServeAppKVCacheFull",
        "max by (replica) (serve_app_kv_cache_usage_perc) > 0.95 and on () sum (serve_app_num_requests_waiting) > 0",
        "5m",
        "warning",
        "Requests wait because the KV cache of a replica is full.",
        "Raise engine.kv_cache_memory, lower max_running, or add replicas.",
    ),
    Alert(
        "ServeAppUnlimited",
        "increase(serve_app_unlimited_requests_total[10m]) > 0",
        "0m",
        "critical",
        "The store that counts callers' limits can't be reached, so nobody is limited.",
        "Look at the store that auth.limits names, or at the actor's node.",
    ),
)
