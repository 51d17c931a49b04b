"""Tables of a comparison: every figure, and the ratios to the best peer.

Promises that a ratio is taken between a peer's measurement and that of serve_app which is nearest in time, since a
machine drifts between them, and that whoever was not measured is named with the reason. Functions of records only.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from loadtest.compare.workload import Cell, Reader, Set
from loadtest.http_load import percentile

Record = dict[str, Any]
DELIVERY = re.compile(r"Ingress|Proxy|haproxy")
"""Titles of the processes between the model server and the socket."""
Metric = Callable[[Record], float]


@dataclass(frozen=True, slots=True)
class Goal:
    """A target: a multiple of the best peer's tokens per second."""

    cell: Cell
    at_least: float


GOALS = (
    Goal(Cell(Set.VARIED, 1), 1.0),
    Goal(Cell(Set.VARIED, 8), 1.25),
    Goal(Cell(Set.VARIED, 32), 1.25),
    Goal(Cell(Set.SHARED, 8), 1.5),
)
WARM_SHARE = 0.15
"""Target: the largest share of the cold time to first token, with a prefix of 600 tokens in the cache."""


def tokens_per_second(record: Record) -> float:
    """Of all streams together."""
    return float(record["tokens"] / record["seconds"])


def cpu_s_per_1000(record: Record) -> float:
    """CPU seconds of the server's processes for a thousand tokens."""
    return float(1000 * record["cpu_s"] / record["tokens"])


def client_cores(record: Record) -> float:
    """How much of a core the load generator used meanwhile."""
    return float(record["client_cpu_s"] / record["wall_s"])


def ttft_p50_s(record: Record) -> float:
    """Median time to the first piece."""
    return percentile(record["ttft_s"], 0.5)


def cell_of(record: Record) -> Cell:
    """What was measured."""
    return Cell(Set(record["set"]), record["concurrency"], Reader(record["reader"]))


def median(metric: Metric, records: Sequence[Record]) -> float:
    """Of the records' figures; there must be one at least."""
    return statistics.median(metric(record) for record in records)


def by_cell(records: Sequence[Record]) -> dict[Cell, dict[str, list[Record]]]:
    """The measurements that succeeded, {cell: {contender: records}}, each in the order in which it first came.

    Disturbed ones only where a contender has no other.
    """
    grouped: dict[Cell, dict[str, list[Record]]] = {}
    for record in records:
        if "failed" not in record:
            grouped.setdefault(cell_of(record), {}).setdefault(record["contender"], []).append(record)
    return {
        cell: {name: [r for r in found if not r["disturbed"]] or found for name, found in measured.items()}
        for cell, measured in grouped.items()
    }


def paired_ratio(metric: Metric, ours: Sequence[Record], theirs: Sequence[Record]) -> float:
    """Median over their measurements of (our figure nearest in time) / theirs. Neither may be empty."""
    return statistics.median(
        metric(min(ours, key=lambda our: abs(our["at"] - their["at"]))) / metric(their) for their in theirs
    )


def best_peer(
    metric: Metric, measured: dict[str, list[Record]], ours: str, peers: Sequence[str], *, higher_is_better: bool
) -> tuple[str, float] | None:
    """The peer that does best against `ours`, and our ratio to it; None when nobody can be compared."""
    ratios = {
        peer: paired_ratio(metric, measured[ours], measured[peer])
        for peer in peers
        if peer in measured and ours in measured
    }
    if not ratios:
        return None
    best = (min if higher_is_better else max)(ratios, key=lambda peer: ratios[peer])
    return best, ratios[best]


def summary(records: Sequence[Record], ours: Sequence[str], peers: Sequence[str]) -> str:
    """Markdown: our ratios to the best peer of each figure, for each kind of work and each of ours; with a star where
    one of the two was measured only while it was disturbed."""
    head = ["work", "", "tok/s", "TTFT p50", "CPU per token"]
    lines = [_row(head), _row(["---"] * len(head))]
    for cell, measured in by_cell(records).items():
        for name in ours:
            row = [str(cell), name]
            for metric, higher in ((tokens_per_second, True), (ttft_p50_s, False), (cpu_s_per_1000, False)):
                best = best_peer(metric, measured, name, peers, higher_is_better=higher)
                row.append("-" if best is None else f"{best[1]:.2f}{_mark(measured, name, best[0])} ({best[0]})")
            lines.append(_row(row))
    return "\n".join(lines)


def _mark(measured: dict[str, list[Record]], *contenders: str) -> str:
    """A star when there is nothing undisturbed of one of them."""
    return "*" if any(measured[name][0]["disturbed"] for name in contenders) else ""


def figures_to_reach(records: Sequence[Record], ours: Sequence[str], peers: Sequence[str]) -> str:
    """Markdown: the targets of this comparison, and what each of ours did. A figure that was measured only while
    other programs disturbed it has a star, and is no evidence."""
    head = ["figure", "asked", *ours]
    lines = [_row(head), _row(["---"] * len(head))]
    cells = by_cell(records)
    for goal in GOALS:
        found = (_against_goal(goal, cells.get(goal.cell, {}), name, peers) for name in ours)
        lines.append(_row([f"{goal.cell}: tok/s, times the best peer's", f"at least {goal.at_least:.2f}", *found]))
    shares = (_warm_share(records, name) for name in ours)
    what = "one request at a time: TTFT with the prefix in the cache / cold"
    lines.append(_row([what, f"at most {WARM_SHARE:.2f}", *shares]))
    return "\n".join(lines)


def verdict(value: float, *, at_least: float | None = None, at_most: float | None = None) -> str:
    """`reached` or `NOT reached`, by the figure itself and not by what is printed of it."""
    low = at_least is not None and value < at_least
    high = at_most is not None and value > at_most
    return "NOT reached" if low or high else "reached"


def _against_goal(goal: Goal, measured: dict[str, list[Record]], name: str, peers: Sequence[str]) -> str:
    best = best_peer(tokens_per_second, measured, name, peers, higher_is_better=True)
    if best is None:
        return "not measured"
    peer, ratio = best
    return f"{ratio:.2f}{_mark(measured, name, peer)} ({peer}): {verdict(ratio, at_least=goal.at_least)}"


def _warm_share(records: Sequence[Record], name: str) -> str:
    found = _shared(records).get(name, [])
    if not found:
        return "not measured"
    share = alone_ratio(found)
    return f"{share:.2f}{'*' if found[0]['disturbed'] else ''}: {verdict(share, at_most=WARM_SHARE)}"


def figures(records: Sequence[Record], ours: Sequence[str], peers: Sequence[str], memory: str) -> str:
    """Markdown: a row for each cell and contender. Figures are medians over the rounds; TTFTs are of all rounds."""
    head = ["work", "contender", "tok/s", *(f"{name} is x" for name in ours)]
    head += ["TTFT p50 / p95 / p99, ms", "ITL p50 / p95 / p99, ms", "CPU s per 1,000 tokens"]
    head += ["load generator, cores", f"memory ({memory}), GB", "sum of peak RSS, GB"]
    lines = [_row(head), _row(["---"] * len(head))]
    for cell, measured in by_cell(records).items():
        for contender in (*ours, *peers):
            if contender in measured:
                ratios = _ratios(measured, contender, ours)
                disturbed = " (disturbed)" if _mark(measured, contender) else ""
                lines.append(_row([str(cell), contender + disturbed, *_cells(measured[contender], ratios)]))
    lines += [_row([str(cell_of(record)), record["contender"], f"failed: {record['failed']}"])
              for record in records if "failed" in record]  # fmt: skip
    return "\n".join(lines)


def _ratios(measured: dict[str, list[Record]], contender: str, ours: Sequence[str]) -> list[str]:
    comparable = [name for name in ours if name in measured and name != contender]
    return [
        f"{paired_ratio(tokens_per_second, measured[name], measured[contender]):.2f}" if name in comparable else ""
        for name in ours
    ]


def _cells(records: list[Record], ratios: list[str]) -> Iterator[str]:
    firsts = [first for record in records for first in record["ttft_s"]]
    gaps = [statistics.median(record["itl_s"][place] for record in records) for place in range(3)]
    yield f"{median(tokens_per_second, records):.1f}"
    yield from ratios
    yield " / ".join(f"{1000 * percentile(firsts, share):.0f}" for share in (0.5, 0.95, 0.99))
    yield " / ".join(f"{1000 * gap:.0f}" for gap in gaps)
    yield f"{median(cpu_s_per_1000, records):.1f}"
    yield f"{median(client_cores, records):.2f}"
    yield f"{max(record['memory_bytes'] for record in records) / 1e9:.2f}"
    yield f"{max(record['peak_rss_bytes'] for record in records) / 1e9:.2f}"


def prefix_table(records: Sequence[Record], names: Sequence[str]) -> str:
    """Markdown: times to first token with a shared prefix of 600 tokens in the cache, beside those of as many requests
    at a time whose prefixes nobody has seen. Empty without a shared set."""
    head = ["contender", "requests at a time", "cold TTFT p50, ms", "warm TTFT p50, ms", "warm / cold"]
    lines = []
    for name in names:
        if found := _shared(records).get(name):
            cold_s, warm_s = (_alone_ttft_p50_s(key, found) for key in ("cold_alone_ttft_s", "warm_alone_ttft_s"))
            lines.append(_prefix_row(name, "1", cold_s, warm_s, alone_ratio(found)))
    for cell, measured in by_cell(records).items():
        for name in names:
            if cell.set is Set.SHARED and cell.concurrency > 1 and (found := measured.get(name)):
                cold_s, warm_s = (median(metric, found) for metric in (cold_ttft_p50_s, ttft_p50_s))
                ratio = median(lambda record: ttft_p50_s(record) / cold_ttft_p50_s(record), found)
                lines.append(_prefix_row(name, str(cell.concurrency), cold_s, warm_s, ratio))
    return "\n".join([_row(head), _row(["---"] * len(head)), *lines]) if lines else ""


def _prefix_row(name: str, at_a_time: str, cold_s: float, warm_s: float, ratio: float) -> str:
    return _row([name, at_a_time, f"{1000 * cold_s:.0f}", f"{1000 * warm_s:.0f}", f"{ratio:.2f}"])


def _shared(records: Sequence[Record]) -> dict[str, list[Record]]:
    """What was measured of each contender with a shared prefix, at whatever concurrency."""
    found: dict[str, list[Record]] = {}
    for cell, measured in by_cell(records).items():
        for name in measured if cell.set is Set.SHARED else ():
            found.setdefault(name, []).extend(measured[name])
    return found


def _alone_ttft_p50_s(key: str, records: Sequence[Record]) -> float:
    return statistics.median(first for record in records for first in record[key])


def alone_ratio(records: Sequence[Record]) -> float:
    """Median over the pairs of requests of (TTFT with the prefix in the cache) / (TTFT when nobody had seen it)."""
    return statistics.median(
        warm / cold
        for record in records
        for cold, warm in zip(record["cold_alone_ttft_s"], record["warm_alone_ttft_s"], strict=True)
    )


def cold_ttft_p50_s(record: Record) -> float:
    """Of as many requests at a time as those with the shared prefix, each with one that nobody had seen."""
    return percentile(record["cold_ttft_s"], 0.5)


def delivery_lines(records: Sequence[Record], ours: Sequence[str]) -> list[str]:
    """CPU milliseconds of our ingress and Serve's proxy for each token, what they spend idle included."""
    lines = []
    for cell, measured in by_cell(records).items():
        for name in ours:
            shares = [
                1000
                * sum(spent for title, spent in record["cpu_by_process_s"].items() if DELIVERY.search(title))
                / record["tokens"]
                for record in measured.get(name, [])
            ]
            if shares:
                lines.append(f"{cell}: {name}: {statistics.median(shares):.2f} ms")
    return lines


def versions_of_ours(records: Sequence[Record], ours: Sequence[str]) -> list[str]:
    """A warning where figures of several commits stand beside each other."""
    versions = list(dict.fromkeys(record["version"] for record in records if record["contender"] in ours))
    if len(versions) < 2:
        return []
    return [f"**serve_app changed between the measurements**: {', '.join(versions)}. The figures are of no one commit."]


def agreement(records: Sequence[Record], reference: str) -> list[str]:
    """Of each contender: in how many greedy answers it agrees with `reference` to the last character, and whether the
    prompts had as many tokens. Arithmetic differs, so a near-tie may fall the other way; hardly any should."""
    known = {_key(record): record for record in records if record["contender"] == reference and "failed" not in record}
    same: dict[str, int] = {}
    total: dict[str, int] = {}
    other_prompts: dict[str, int] = {}
    for record in records:
        name = record["contender"]
        if name == reference or "failed" in record or _key(record) not in known:
            continue
        theirs = known[_key(record)]
        same[name] = same.get(name, 0) + sum(a == b for a, b in zip(record["digests"], theirs["digests"], strict=True))
        total[name] = total.get(name, 0) + len(record["digests"])
        other_prompts[name] = other_prompts.get(name, 0) + (record["prompt_tokens"] != theirs["prompt_tokens"])
    return [
        f"{name}: {same[name]} of {total[name]} answers are those of {reference}"
        + (f"; PROMPTS OF OTHER LENGTHS in {other_prompts[name]} measurements" if other_prompts[name] else "")
        for name in total
    ]


def _key(record: Record) -> tuple[Cell, str]:
    return cell_of(record), record["turn"]


def disturbance(records: Sequence[Record]) -> str:
    """How much of the machine other programs used while something was measured."""
    kept = [record for measured in by_cell(records).values() for found in measured.values() for record in found]
    if not kept:
        return "Nothing was measured."
    shares = [record["other_cpu_s"] / record["wall_s"] for record in kept]
    left_out = sum("failed" not in record for record in records) - len(kept)
    return (
        f"Other programs used {statistics.median(shares):.2f} cores while something was measured (median; at most "
        f"{max(shares):.2f}); {left_out} measurements that they disturbed more are left out."
    )


def _row(values: Sequence[str]) -> str:
    return f"| {' | '.join(values)} |"
