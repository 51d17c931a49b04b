"""What a chaos run found: verdicts, pauses and counts as one table, and whether the service kept its promises.

Pure: what clients and injector noted goes in, figures come out.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from loadtest.faults import FREEZE_S, Injected
from loadtest.http_load import percentile
from loadtest.outcome import Outcome
from loadtest.schedule import Fault
from loadtest.verdicts import Answer, Verdict, judge
from loadtest.workload import Kind, Mode, Question

EXCUSED_S = {Fault.KILL_INGRESS: 10.0, Fault.KILL_PROXY: 15.0}
"""How long after such a fault a client without resume may get a connection error: until Serve has noticed and replaced
what died. A dead proxy is replaced after three looks, 1 s apart; measured: 4 to 7 s until it listened again."""
UNCLEAN = "as if it were whole"
_SOON_S = 1.0
"""A pause belongs to a kill when its last token came at most so long before or after: tokens on their way still arrive,
and a stream that had stood still for longer had another reason."""


_QUIET = frozenset({Fault.DROP_CLIENTS, Fault.SCALE_UP})
"""Faults that take nothing away from the streams of others."""
_OF_MODELS = frozenset({Fault.KILL_MODEL, Fault.KILL_ALL_MODELS, Fault.FREEZE_MODEL})
MOST_SKIPPED = 0.1
"""Of the faults that were asked for. Some find nothing to hit: the service is whole for a part of the time only."""
ENOUGH = 3
"""So many hits leave a trace. One or two may find a replica, or a client, that has nothing to lose just then."""


@dataclass(frozen=True, slots=True)
class Judged:
    """One client's outcome and what is to be said of it."""

    outcome: Outcome
    verdict: Verdict
    reason: str
    """Empty when identical."""
    moved: bool
    """An ingress logged that it continued the stream on another attempt, or took it over."""
    again_s: float | None = None
    """How long computing what it had took there, where it moved once."""
    kind: Kind = Kind.PLAIN


def judge_outcome(
    outcome: Outcome,
    question: Question,
    reference: Answer,
    *,
    batch_invariant: bool,
    moved: bool,
    again_s: float | None = None,
) -> Judged:
    """The worst of what the wire, the ending and the answer say."""
    verdict, reason = _verdict(outcome, question, reference, batch_invariant=batch_invariant)
    return Judged(outcome, verdict, reason, moved, again_s, question.kind)


def _verdict(outcome: Outcome, question: Question, reference: Answer, *, batch_invariant: bool) -> tuple[Verdict, str]:
    if outcome.repeated_events:
        return Verdict.DUPLICATED, "; ".join(outcome.faults)
    if outcome.faults:
        return Verdict.LOST, "; ".join(outcome.faults)
    if outcome.answer is None:
        return Verdict.LOST, outcome.failure or "no answer"
    verdict = judge(outcome.answer, reference, question.max_tokens * question.choices, batch_invariant=batch_invariant)
    return verdict, "" if verdict is Verdict.IDENTICAL else f"got {outcome.answer}, want {reference}"


def unexcused(outcome: Outcome, injected: Sequence[Injected]) -> list[str]:
    """Connections of a client that were ended with no ingress or proxy killed shortly before."""
    return [
        what
        for at_s, what in outcome.broken
        if not any(0 <= at_s - fault.at_s <= EXCUSED_S.get(fault.fault, -1) for fault in injected)
    ]


def pauses_after(
    judged: Iterable[Judged], hits: Sequence[Injected], others: Sequence[Injected] = (), *, less_again: bool = False
) -> list[float]:
    """Of moved streams: the longest gap between events that begins around a hit of a model replica, in seconds.

    Where the client's own connection broke in the gap, it tells nothing about the model replicas; where one of `others`
    came shortly before the hit or in the gap, nothing about this hit. `less_again`: without the time in which the other
    replica computed what the stream had, of those of which it is known.
    """
    pauses = []
    for one in judged:
        arrivals, breaks = one.outcome.arrivals_s, _breaks(one.outcome)
        gaps = [
            (before, after)
            for before, after in itertools.pairwise(arrivals)
            if one.moved and not any(before <= at_s <= after for at_s in breaks)
        ]
        for hit in hits:
            near = [other.at_s for other in others if other is not hit and hit.at_s - FREEZE_S < other.at_s]
            around = [gap for gap in gaps if abs(gap[0] - hit.at_s) < _SOON_S and gap[1] > hit.at_s]
            before, after = max(around, key=lambda gap: gap[1] - gap[0], default=(0.0, 0.0))
            if around and arrivals[0] < hit.at_s and not any(at_s < after for at_s in near):
                if not less_again:
                    pauses.append(after - before)
                elif one.again_s is not None:
                    pauses.append(max(0.0, after - before - one.again_s))
    return pauses


def _breaks(outcome: Outcome) -> list[float]:
    return [*outcome.cut_s, *(at_s for at_s, _ in outcome.broken)]


def pauses_of_resumes(judged: Iterable[Judged], *, own: bool, since_it_went: bool = False) -> list[float]:
    """From the last event before a connection went to the first after it, in seconds, of clients that resume.

    `own`: those that the client dropped itself, else those that it lost. `since_it_went`: not from the last event, but
    from the moment when the connection went: a client may have waited already, since a model replica had died.
    """
    pauses = []
    for one in judged:
        if one.outcome.visit.mode is Mode.RESUME:
            lost_s = [at_s for at_s, _ in one.outcome.broken]
            for before, after in itertools.pairwise(one.outcome.arrivals_s):
                lost = any(before <= at_s <= after for at_s in lost_s)
                dropped = any(before <= at_s <= after for at_s in one.outcome.cut_s)
                if dropped and not lost if own else lost:
                    gone_s = one.outcome.cut_s if own else lost_s
                    went_s = min(at_s for at_s in gone_s if before <= at_s <= after)
                    pauses.append(after - (went_s if since_it_went else before))
    return pauses


def summary(
    judged: Sequence[Judged], injected: Sequence[Injected], asked_for: Sequence[Fault], *, batch_invariant: bool
) -> dict[str, Any]:
    """All figures of the run, ready for JSON. `asked_for`: the faults of the schedule, carried out or skipped."""
    verdicts = Counter(one.verdict for one in judged)
    plain = [one.outcome for one in judged if one.outcome.visit.mode is not Mode.RESUME]
    resuming = [one.outcome for one in judged if one.outcome.visit.mode is Mode.RESUME]
    without_cause = [what for outcome in plain for what in unexcused(outcome, injected)]
    unclean = [what for outcome in plain for _, what in outcome.broken if UNCLEAN in what]
    moved = [one for one in judged if one.moved]
    return {
        "batch_invariant": batch_invariant,
        "streams": len(judged),
        "modes": Counter(str(one.outcome.visit.mode) for one in judged),
        "kinds": {str(kind): _of_kind([one for one in judged if one.kind is kind]) for kind in Kind},
        "faults_asked_for": Counter(str(fault) for fault in asked_for),
        "faults": len(injected),
        "faults_by_kind": Counter(str(fault.fault) for fault in injected),
        "continued": len(moved),
        "continued_identical": sum(one.verdict is Verdict.IDENTICAL for one in moved),
        **{str(verdict): verdicts[verdict] for verdict in Verdict},
        "clients_with_connection_errors": sum(bool(outcome.broken) for outcome in plain),
        "clean_connection_errors": sum(len(outcome.broken) for outcome in plain) - len(without_cause) - len(unclean),
        "cut_without_cause": without_cause,
        "ended_as_if_whole": unclean,
        "refused": sum(one.outcome.refused for one in judged),
        "client_drops": sum(len(outcome.cut_s) for outcome in resuming),
        "connections_lost_by_resuming": sum(len(outcome.broken) for outcome in resuming),
        "resumes": sum(outcome.resumed for outcome in resuming),
        **_pauses_by_hit(judged, injected),
        "pause_of_drop_s": _percentiles(pauses_of_resumes(judged, own=True)),
        "pause_of_lost_connection_s": _percentiles(pauses_of_resumes(judged, own=False)),
        "pause_since_connection_went_s": _percentiles(pauses_of_resumes(judged, own=False, since_it_went=True)),
        "injected": [
            {"at_s": fault.at_s, "fault": fault.fault, "hits": fault.hits, "peers": fault.peers} for fault in injected
        ],
        "outcomes": [_row(one) for one in judged],
        "failures": [
            {
                "visit": one.outcome.visit.number,
                "kind": one.kind,
                "mode": one.outcome.visit.mode,
                "verdict": one.verdict,
                "why": one.reason,
            }
            for one in judged
            if one.verdict is not Verdict.IDENTICAL
        ],
    }


def _of_kind(judged: Sequence[Judged]) -> dict[str, int]:
    verdicts = Counter(one.verdict for one in judged)
    return {
        "streams": len(judged),
        **{str(verdict): verdicts[verdict] for verdict in Verdict},
        "continued": sum(one.moved for one in judged),
        "resumes": sum(one.outcome.resumed for one in judged),
    }


def _row(one: Judged) -> dict[str, Any]:
    outcome = one.outcome
    gap, at_s = max(
        ((after - before, before) for before, after in itertools.pairwise(outcome.arrivals_s)), default=(0.0, 0.0)
    )
    return {
        "request_ids": outcome.request_ids,
        "question": outcome.visit.question,
        "kind": one.kind,
        "mode": outcome.visit.mode,
        "verdict": one.verdict,
        "moved": one.moved,
        "began_s": outcome.began_s,
        "ended_s": outcome.ended_s,
        "longest_gap_s": round(gap, 3),
        "longest_gap_at_s": at_s,
        "cut_s": outcome.cut_s,
        "broken": outcome.broken,
        "refused": outcome.refused,
    }


def _pauses_by_hit(judged: Sequence[Judged], injected: Sequence[Injected]) -> dict[str, Any]:
    kills = [fault for fault in injected if fault.fault is Fault.KILL_MODEL and fault.peers > 0]
    freezes = [fault for fault in injected if fault.fault is Fault.FREEZE_MODEL and fault.peers > 0]
    disruptive = [fault for fault in injected if fault.fault not in _QUIET]
    massacres = [fault for fault in injected if fault.fault is Fault.KILL_ALL_MODELS]
    return {
        "models_hit": len([fault for fault in injected if fault.fault in _OF_MODELS]),
        "kills_apart": len([hit for hit in kills if not _crowded(hit, disruptive)]),
        "pause_after_kill_s": _percentiles(pauses_after(judged, kills, disruptive)),
        "pause_after_kill_less_again_s": _percentiles(pauses_after(judged, kills, disruptive, less_again=True)),
        "pause_after_freeze_s": _percentiles(pauses_after(judged, freezes, disruptive)),
        "pause_after_last_kill_s": _percentiles(pauses_after(judged, massacres, disruptive)),
    }


def _crowded(hit: Injected, others: Sequence[Injected]) -> bool:
    """Whether another fault came so near that the pauses around this one may be its doing."""
    return any(abs(other.at_s - hit.at_s) < FREEZE_S for other in others if other is not hit)


def kept(figures: dict[str, Any]) -> bool:
    """Whether the run shows that no promise was broken: none was, and the service was put to the test."""
    bad = figures["lost"] + figures["duplicated"] + figures["corrupted"]
    bad += len(figures["cut_without_cause"]) + len(figures["ended_as_if_whole"])
    sound = not bad and not (figures["batch_invariant"] and figures["diverged"])
    return sound and figures["idle"]["ok"] and not untested(figures)


def untested(figures: dict[str, Any]) -> list[str]:
    """What the run was to do and has not done, in words."""
    wanted, done = figures["faults_asked_for"], figures["faults_by_kind"]
    asked, carried_out = sum(wanted.values()), figures["faults"]
    missing = [f"never carried out: {fault} (asked for: {wanted[fault]})" for fault in wanted if not done.get(fault)]
    if asked - carried_out > MOST_SKIPPED * asked:
        missing.append(f"only {carried_out} of {asked} faults were carried out")
    back, killed = len(figures["proxy_outages_s"]), done.get(Fault.KILL_PROXY, 0)
    if back < killed:
        missing.append(f"the proxy was killed {killed} times, and listened again after {back} of them")
    for hits, what, traces, trace in (
        (figures["models_hit"], "hits of model replicas", figures["continued"], "no stream was continued"),
        (
            figures["kills_apart"],
            "kills of a model replica, apart from other faults",
            figures["pause_after_kill_s"]["count"],
            "no pause was seen",
        ),
        (figures["client_drops"], "drops by clients", figures["resumes"], "none has resumed"),
    ):
        if hits >= ENOUGH and not traces:
            missing.append(f"{trace}, after {hits} {what}")
    return missing


def _percentiles(values: list[float]) -> dict[str, float | int | None]:
    if not values:
        return {"count": 0, "p50": None, "p99": None, "max": None}
    return {
        "count": len(values),
        "p50": round(percentile(values, 0.5), 3),
        "p99": round(percentile(values, 0.99), 3),
        "max": round(max(values), 3),
    }


def table(figures: dict[str, Any]) -> str:
    """Markdown."""
    rows: list[tuple[str, object]] = [
        ("streams", f"{figures['streams']} ({_listed(figures['modes'])})"),
        *((f"- {kind}", _kind_row(counts)) for kind, counts in figures["kinds"].items() if counts["streams"]),
        ("faults", f"{figures['faults']} of {sum(figures['faults_asked_for'].values())} that were asked for"),
        *((f"- {kind}", count) for kind, count in figures["faults_by_kind"].items()),
        ("continued on another replica", f"{figures['continued']} ({figures['continued_identical']} identical)"),
        ("**identical**", f"**{figures['identical']}** ({_share(figures['identical'], figures['streams'])})"),
        ("diverged, whole and sound", figures["diverged"]),
        ("**lost**", f"**{figures['lost']}**"),
        ("**duplicated**", f"**{figures['duplicated']}**"),
        ("**corrupted**", f"**{figures['corrupted']}**"),
        (
            "clean connection errors (no resume; ingress or proxy killed)",
            f"{figures['clean_connection_errors']}, of {figures['clients_with_connection_errors']} clients",
        ),
        ("proxy listened again after", ", ".join(f"{s:.0f} s" for s in figures["proxy_outages_s"]) or "not killed"),
        ("connections cut without such a cause", len(figures["cut_without_cause"])),
        ("bodies that ended as if whole", len(figures["ended_as_if_whole"])),
        ("refused with Retry-After", figures["refused"]),
        (
            "drops by clients / lost by resuming clients / resumes",
            f"{figures['client_drops']} / {figures['connections_lost_by_resuming']} / {figures['resumes']}",
        ),
        ("pause after a kill, another replica alive", _pause(figures["pause_after_kill_s"])),
        ("- less the time to compute its tokens again", _pause(figures["pause_after_kill_less_again_s"])),
        ("pause after a freeze, another replica alive", _pause(figures["pause_after_freeze_s"])),
        ("pause after all model replicas were killed", _pause(figures["pause_after_last_kill_s"])),
        ("pause of a client's own drop, with resume", _pause(figures["pause_of_drop_s"])),
        ("pause of a lost connection, with resume", _pause(figures["pause_of_lost_connection_s"])),
        ("- counted from when the connection went", _pause(figures["pause_since_connection_went_s"])),
        ("not put to the test", "; ".join(untested(figures)) or "nothing"),
        ("back to idle", "yes" if figures["idle"]["ok"] else f"NO: {'; '.join(figures['idle']['wrong'])}"),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _kind_row(counts: dict[str, int]) -> str:
    bad = [
        f"{counts[verdict]} {verdict}" for verdict in Verdict if verdict is not Verdict.IDENTICAL and counts[verdict]
    ]
    said = [f"{counts['streams']}: {counts['identical']} identical", *bad]
    return ", ".join([*said, f"{counts['continued']} continued, {counts['resumes']} resumes"])


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "none"


def _pause(pause: dict[str, Any]) -> str:
    if not pause["count"]:
        return "none seen"
    return f"p50 {pause['p50']:.2f} s, p99 {pause['p99']:.2f} s, max {pause['max']:.2f} s ({pause['count']} pauses)"
