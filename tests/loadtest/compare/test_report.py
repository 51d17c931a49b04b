"""Tables and ratios of a comparison, from records alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loadtest.compare import __main__ as compare
from loadtest.compare import report
from loadtest.compare.client import Stream
from loadtest.compare.contenders import FAST
from loadtest.compare.contenders import PEERS as CONTENDERS
from loadtest.compare.measure import figures
from loadtest.compare.results import Results
from loadtest.compare.workload import Cell, Set

OURS, PEERS = ("ours",), ("slow", "quick", "absent")


def record(contender: str, at: float, seconds: float, **other: Any) -> dict[str, Any]:
    return {
        "contender": contender, "set": "varied", "concurrency": 8, "reader": "unpaced", "turn": "round 0",
        "at": at, "disturbed": False,
        "tokens": 100, "seconds": seconds, "ttft_s": [0.1, 0.2, 0.3], "itl_s": [0.01, 0.02, 0.03], "cpu_s": 2 * seconds,
        "client_cpu_s": 0.5, "other_cpu_s": 0.25, "wall_s": 5.0, "memory_bytes": 2e9, "peak_rss_bytes": 3e9,
        "prompt_tokens": 40, "digests": ["a", "b"], **other,
    }  # fmt: skip


DRIFTING = [
    record("ours", 0, 1.0),
    record("slow", 10, 2.0),
    record("ours", 20, 1.0),
    record("ours", 1000, 3.0),  # the machine has become three times slower
    record("quick", 1010, 2.4),
]


def test_a_ratio_is_taken_with_the_measurement_nearest_in_time() -> None:
    (measured,) = report.by_cell(DRIFTING).values()
    assert report.paired_ratio(report.tokens_per_second, measured["ours"], measured["slow"]) == pytest.approx(2.0)
    assert report.paired_ratio(report.tokens_per_second, measured["ours"], measured["quick"]) == pytest.approx(0.8)


def test_the_best_peer_is_the_one_that_does_best_against_us() -> None:
    (measured,) = report.by_cell(DRIFTING).values()
    best = report.best_peer(report.tokens_per_second, measured, "ours", PEERS, higher_is_better=True)
    assert best == ("quick", pytest.approx(0.8))
    least_cpu = report.best_peer(report.cpu_s_per_1000, measured, "ours", PEERS, higher_is_better=False)
    assert least_cpu == ("quick", pytest.approx(1.25))


def test_without_peers_there_is_no_ratio() -> None:
    (measured,) = report.by_cell([record("ours", 0, 1.0)]).values()
    assert report.best_peer(report.tokens_per_second, measured, "ours", PEERS, higher_is_better=True) is None
    assert report.best_peer(report.tokens_per_second, measured, "other", ("ours",), higher_is_better=True) is None
    assert "| varied, 8 | ours | - | - | - |" in report.summary([record("ours", 0, 1.0)], OURS, PEERS)


def test_the_table_has_a_row_for_each_measured_and_each_failed() -> None:
    failed = {key: value for key, value in record("quick", 5, 1.0).items() if key not in ("tokens", "seconds")}
    rows = report.figures(
        [record("ours", 0, 1.0), record("slow", 1, 2.0), failed | {"failed": "503"}], OURS, PEERS, "PSS"
    )
    lines = rows.splitlines()
    assert "memory (PSS), GB" in lines[0]
    assert lines[2] == "| varied, 8 | ours | 100.0 |  | 200 / 300 / 300 | 10 / 20 / 30 | 20.0 | 0.10 | 2.00 | 3.00 |"
    assert lines[3] == "| varied, 8 | slow | 50.0 | 2.00 | 200 / 300 / 300 | 10 / 20 / 30 | 40.0 | 0.10 | 2.00 | 3.00 |"
    assert lines[4] == "| varied, 8 | quick | failed: 503 |"
    assert len(lines) == 5


def test_agreement_counts_equal_answers_and_points_at_other_prompts() -> None:
    same = record("slow", 1, 2.0, digests=["a", "x"])
    other = record("quick", 1, 2.0, prompt_tokens=41)
    later = record("slow", 1, 2.0, turn="round 1")  # ours has no such turn
    lines = report.agreement([record("ours", 0, 1.0), same, other, later], "ours")
    assert lines == [
        "slow: 1 of 2 answers are those of ours",
        "quick: 2 of 2 answers are those of ours; PROMPTS OF OTHER LENGTHS in 1 measurements",
    ]


def shared(contender: str, at: float, seconds: float, warm_alone_s: list[float], **other: Any) -> dict[str, Any]:
    firsts = {"cold_alone_ttft_s": [1.0, 2.0], "warm_alone_ttft_s": warm_alone_s, "cold_ttft_s": [0.8, 0.8, 0.8]}
    return record(contender, at, seconds, **({"set": "shared"} | firsts | other))


def test_a_warm_prefix_stands_beside_as_many_cold_ones_at_a_time() -> None:
    ours = [shared("ours", 0, 1.0, [0.1, 0.2]), shared("ours", 1, 1.0, [0.3, 0.2], cold_ttft_s=[0.4, 0.4, 0.4])]
    lines = report.prefix_table([*ours, shared("slow", 2, 1.0, [1.0, 2.0]), record("ours", 3, 1.0)], ["ours", "slow"])
    assert lines.splitlines()[2:] == [
        "| ours | 1 | 1500 | 200 | 0.10 |",  # pairs: 0.1 / 1, 0.2 / 2, 0.3 / 1, 0.2 / 2
        "| slow | 1 | 1500 | 1500 | 1.00 |",
        "| ours | 8 | 600 | 200 | 0.38 |",  # rounds: 0.2 / 0.8 and 0.2 / 0.4
        "| slow | 8 | 800 | 200 | 0.25 |",
    ]
    assert report.prefix_table([record("ours", 0, 1.0)], ["ours"]) == ""


def test_the_figures_to_reach_say_reached_or_not_for_each_of_ours() -> None:
    ours = ("ours", "other")
    records = [
        record("ours", 0, 1.0), record("slow", 1, 2.0), record("quick", 2, 1.2), record("other", 3, 0.9),
        shared("ours", 4, 1.0, [0.1, 0.2]), shared("quick", 5, 1.5, [0.1, 0.2]), shared("other", 6, 1.1, [0.2, 0.4]),
        record("quick", 7, 1.0, concurrency=1, disturbed=True), record("ours", 8, 1.0, concurrency=1),
    ]  # fmt: skip
    rows = report.figures_to_reach(records, ours, PEERS).splitlines()[2:]
    assert [row.split(" | ")[1:] for row in rows] == [
        ["at least 1.00", "1.00* (quick): reached", "not measured |"],
        ["at least 1.25", "1.20 (quick): NOT reached", "1.33 (quick): reached |"],
        ["at least 1.25", "not measured", "not measured |"],
        ["at least 1.50", "1.50 (quick): reached", "1.36 (quick): NOT reached |"],
        ["at most 0.15", "0.10: reached", "0.20: NOT reached |"],
    ]


def test_a_verdict_is_of_the_figure_and_not_of_what_is_printed() -> None:
    assert report.verdict(0.8499, at_least=0.85) == "NOT reached"
    assert report.verdict(0.85, at_least=0.85) == "reached"
    assert report.verdict(10.01, at_most=10) == "NOT reached"


def test_figures_of_two_commits_are_pointed_at() -> None:
    one, two = record("ours", 0, 1.0, version="a"), record("ours", 1, 1.0, version="b")
    assert report.versions_of_ours([one, one, record("slow", 2, 1.0, version="7")], OURS) == []
    (line,) = report.versions_of_ours([one, two], OURS)
    assert "serve_app changed between the measurements**: a, b" in line


def test_a_disturbed_measurement_counts_only_where_there_is_no_other() -> None:
    ours = [record("ours", 0, 9.0, disturbed=True, other_cpu_s=4.0), record("ours", 10, 1.0)]
    theirs = record("slow", 20, 2.0, disturbed=True)
    (measured,) = report.by_cell([*ours, theirs]).values()
    assert [r["seconds"] for r in measured["ours"]] == [1.0]
    assert [r["seconds"] for r in measured["slow"]] == [2.0]
    assert "| varied, 8 | slow (disturbed) | 50.0 |" in report.figures([*ours, theirs], OURS, PEERS, "PSS")
    assert "| varied, 8 | ours | 2.00* (slow) |" in report.summary([*ours, theirs], OURS, PEERS)
    assert "1 measurements that they disturbed more are left out" in report.disturbance([*ours, theirs])


def test_the_summary_names_the_best_peer_of_each_figure() -> None:
    rows = report.summary([record("ours", 0, 1.0), record("slow", 1, 2.0, ttft_s=[0.1])], OURS, PEERS)
    assert rows.splitlines()[2] == "| varied, 8 | ours | 2.00 (slow) | 2.00 (slow) | 0.50 (slow) |"


def test_delivery_is_what_stands_between_model_server_and_socket() -> None:
    spent = {"ray::ServeReplica:app:ModelServer": 9.0, "ray::ServeReplica:app:Ingress": 0.06, "ray::ProxyActor": 0.04}
    lines = report.delivery_lines([record("ours", 0, 1.0, cpu_by_process_s=spent), record("slow", 0, 1.0)], OURS)
    assert lines == ["varied, 8: ours: 1.00 ms"]


def test_disturbance_is_what_others_used() -> None:
    assert "0.05 cores" in report.disturbance([record("ours", 0, 1.0)])
    assert report.disturbance([]) == "Nothing was measured."


def test_figures_of_streams() -> None:
    first = Stream(0.0, [1.0, 1.5, 2.5], "abc", 10, 4)
    second = Stream(1.0, [1.2, 1.4, 3.0], "abd", 12, 4)
    found = figures([first, second], 4)
    assert (found["tokens"], found["seconds"], found["pieces"], found["prompt_tokens"]) == (8, 3.0, 6, 22)
    assert found["ttft_s"] == pytest.approx([0.2, 1.0])
    assert found["itl_s"] == pytest.approx([1.0, 1.6, 1.6])
    assert found["digests"][0] != found["digests"][1]


def test_cells_group_in_the_order_of_measurement() -> None:
    grouped = report.by_cell([record("b", 0, 1.0), record("a", 0, 1.0, concurrency=1), record("a", 1, 1.0)])
    assert list(grouped) == [Cell(Set.VARIED, 8), Cell(Set.VARIED, 1)]
    assert list(grouped[Cell(Set.VARIED, 8)]) == ["b", "a"]


def test_a_peer_of_other_precision_is_shown_and_nobodys_best(tmp_path: Path) -> None:
    results = Results(tmp_path / "compare.json", {"threads": 2})
    coarse = CONTENDERS["llama.cpp-4bit"].name
    assert [name for name, peer in CONTENDERS.items() if not peer.same_precision] == ["llama.cpp-4bit"]
    for contender, seconds in ((FAST.name, 2.0), (CONTENDERS["llama.cpp"].name, 3.0), (coarse, 1.0)):
        results.add(record(contender, 0, seconds, version="1", cpu_by_process_s={}))
    text = compare.markdown(results)
    assert f"({coarse})" not in text
    assert f"| {coarse} |" in text
