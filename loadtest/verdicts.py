"""Whether an answer is the one that the undisturbed service gave, and if not, what is wrong with it.

Pure: two answers in, a verdict out. Knows no server and no clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


@dataclass(frozen=True, slots=True)
class Answer:
    """All that a client can see of a finished answer and that must not depend on what happened on the way."""

    texts: tuple[str, ...]
    """One a choice."""
    finish_reasons: tuple[str | None, ...]
    prompt_tokens: int
    completion_tokens: int
    """Of all choices."""
    token_ids: tuple[int, ...] | None = None
    """Where the wire has them (/stream)."""
    logprobs: tuple[tuple[Any, ...], ...] | None = None
    """One tuple a choice, of entries (token, logprob, ((token, logprob), ...)), where they were asked for."""
    reasoning: tuple[str, ...] = ()
    """One a choice, where the protocol has it."""
    calls: tuple[tuple[tuple[str, str], ...], ...] = ()
    """One tuple a choice, of tool calls (name, arguments as the text that came)."""


LIMITED = frozenset({"length", "max_tokens", "incomplete"})
ENDED = frozenset({"stop", "tool_calls", "completed", "end_turn", "stop_sequence", "tool_use"})
"""Words for how an answer ends, of all protocols: by a limit, or by the model and by a stop string."""


class Verdict(StrEnum):
    """What became of one answer. All but the first two are failures of the service."""

    IDENTICAL = "identical"
    DIVERGED = "diverged"
    """Whole and sound, but other words: a near-tie of the fast mode fell the other way."""
    LOST = "lost"
    DUPLICATED = "duplicated"
    CORRUPTED = "corrupted"


def judge(answer: Answer, reference: Answer, max_tokens: int, *, batch_invariant: bool) -> Verdict:
    """Compare to the bit. Without `batch_invariant` a sound answer may diverge; `max_tokens` is of all choices."""
    if answer == reference:
        return Verdict.IDENTICAL
    if len(answer.texts) != len(reference.texts):
        return Verdict.LOST if len(answer.texts) < len(reference.texts) else Verdict.DUPLICATED
    ended_earlier = answer.completion_tokens < reference.completion_tokens and not ENDED.isdisjoint(
        answer.finish_reasons
    )
    for got, wanted in _sequences(answer, reference):
        if repeats(got, wanted):
            return Verdict.DUPLICATED
        if omits(got, wanted) and (batch_invariant or not ended_earlier):
            return Verdict.LOST
    return Verdict.DIVERGED if not batch_invariant and _sound(answer, reference, max_tokens) else Verdict.CORRUPTED


def _sequences(answer: Answer, reference: Answer) -> list[tuple[Sequence[Any], Sequence[Any]]]:
    pairs: list[tuple[Sequence[Any], Sequence[Any]]] = list(zip(answer.texts, reference.texts, strict=True))
    pairs += zip(answer.reasoning, reference.reasoning, strict=True)
    pairs += zip(map(_written, answer.calls), map(_written, reference.calls), strict=True)
    if answer.token_ids is not None and reference.token_ids is not None:
        pairs.insert(0, (answer.token_ids, reference.token_ids))
    if answer.logprobs is not None and reference.logprobs is not None:
        tokens = [
            ([entry[0] for entry in got], [entry[0] for entry in wanted])
            for got, wanted in zip(answer.logprobs, reference.logprobs, strict=True)
        ]
        pairs[:0] = tokens
    return pairs


def _written(calls: Sequence[tuple[str, str]]) -> str:
    """The calls of one choice as one text."""
    return "".join(f"{name} {arguments}\n" for name, arguments in calls)


def repeats(got: Sequence[Any], wanted: Sequence[Any]) -> bool:
    """Whether `got` is `wanted` with one block of it twice in a row."""
    extra = len(got) - len(wanted)
    if extra <= 0:
        return False
    # With the block taken out, what is left has a prefix and a suffix of `wanted`.
    for start in range(_common_prefix(got, wanted), -1, -1):
        if got[start + extra :] == wanted[start:]:
            block = got[start : start + extra]
            return block in (got[max(0, start - extra) : start], got[start + extra : start + 2 * extra])
    return False


def omits(got: Sequence[Any], wanted: Sequence[Any]) -> bool:
    """Whether `got` is `wanted` without one block of it."""
    missing = len(wanted) - len(got)
    if missing <= 0:
        return False
    prefix = _common_prefix(got, wanted)
    suffix = _common_prefix(got[::-1], wanted[::-1])
    return prefix + suffix >= len(got)


def _common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    for place, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return place
    return min(len(a), len(b))


def _sound(answer: Answer, reference: Answer, max_tokens: int) -> bool:
    """What holds for any answer to the question, whatever its words."""
    if answer.prompt_tokens != reference.prompt_tokens or not 0 < answer.completion_tokens <= max_tokens:
        return False
    if not LIMITED.union(ENDED).issuperset(answer.finish_reasons):
        return False
    if LIMITED.issuperset(answer.finish_reasons) and answer.completion_tokens != max_tokens:
        return False
    return answer.token_ids is None or len(answer.token_ids) == answer.completion_tokens
