"""What `/metrics` shows of what Ray's agents export."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from serve_app.observability.exposition import Exposition

RAYS = """\
# HELP ray_node_cpu_count Total CPUs available on a ray node
# TYPE ray_node_cpu_count gauge
ray_node_cpu_count{SessionName="s",ip="10.0.0.1"} 8.0
# HELP ray_serve_app_requests_total Requests ended.
# TYPE ray_serve_app_requests_total counter
ray_serve_app_requests_total{SessionName="s",WorkerId="w1",application="chat",deployment="Ingress",endpoint="/stream",\
outcome="stop",replica="one"} 3.0
# HELP ray_serve_app_first_token_seconds Seconds.
# TYPE ray_serve_app_first_token_seconds histogram
ray_serve_app_first_token_seconds_bucket{WorkerId="w1",application="chat",endpoint="/s",le="0.1",replica="one"} 2.0
ray_serve_app_first_token_seconds_bucket{WorkerId="w1",application="chat",endpoint="/s",le="+Inf",replica="one"} 3.0
ray_serve_app_first_token_seconds_count{WorkerId="w1",application="chat",endpoint="/s",replica="one"} 3.0
ray_serve_app_first_token_seconds_sum{WorkerId="w1",application="chat",endpoint="/s",replica="one"} 0.5
# HELP ray_serve_app_of_another_version Unknown here.
# TYPE ray_serve_app_of_another_version gauge
ray_serve_app_of_another_version{application="chat",replica="one"} 1.0
"""
LABELS = {
    "serve_app_requests": ("endpoint", "outcome"),
    "serve_app_first_token_seconds": ("endpoint",),
    "serve_app_queued": ("priority",),
}


def exposed(*texts: str) -> str:
    return Exposition(texts, "chat", LABELS).text().decode()


def test_only_our_metrics_are_there_with_our_labels() -> None:
    lines = exposed(RAYS).splitlines()
    assert (
        'serve_app_requests_total{application="chat",deployment="Ingress",endpoint="/stream",outcome="stop",'
        'replica="one"} 3.0' in lines
    )
    assert 'serve_app_first_token_seconds_bucket{application="chat",endpoint="/s",le="0.1",replica="one"} 2.0' in lines
    assert "# TYPE serve_app_requests_total counter" in lines
    assert "# TYPE serve_app_first_token_seconds histogram" in lines
    assert not [line for line in lines if "WorkerId" in line or "ray_" in line or "another" in line]


def test_the_replicas_of_all_nodes_are_one_family() -> None:
    text = exposed(RAYS, RAYS.replace('"one"', '"two"'), "")
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert sorted(families) == ["serve_app_first_token_seconds", "serve_app_requests"]
    assert {sample.labels["replica"] for sample in families["serve_app_requests"].samples} == {"one", "two"}
    assert text.count("# TYPE serve_app_requests_total") == 1


def test_a_label_with_any_text_stays_whole() -> None:
    odd = RAYS.replace('endpoint="/stream"', r'endpoint="a \"b\" \\ c, d={e}"')
    families = {family.name: family for family in text_string_to_metric_families(exposed(odd))}
    assert families["serve_app_requests"].samples[0].labels["endpoint"] == 'a "b" \\ c, d={e}'


def test_a_service_that_has_just_started_has_none() -> None:
    assert exposed("", "# HELP ray_node_cpu_count Total\n") == ""


def test_other_applications_of_the_cluster_are_not_there() -> None:
    assert exposed(RAYS.replace('application="chat"', 'application="other"')) == ""
