"""Decides from the failed attempts of one choice whether to try again, to isolate it, or to give it up.

Counts losses and refusals since the last new token. Pure: knows no replica and no clock.
"""

from __future__ import annotations

from dataclasses import dataclass

from serve_app.core import Failure, FailureCode

_NO_PLACE_NOW = frozenset({FailureCode.OVERLOADED, FailureCode.OVER_SHARE, FailureCode.NOT_READY})
"""Refusals that end a new request at once, and that an accepted one waits out."""


@dataclass(frozen=True, slots=True)
class FailoverSettings:
    """When an attempt counts as lost, and how often another is made."""

    silence_s: float = 5.0
    """A replica sends at least an empty batch each second. After this long without a batch it counts as lost."""
    max_attempts: int = 10
    """The choice fails after this many lost attempts without a new token. An accepted stream counts only attempts that
    a replica had taken: it waits for a replica until its deadline."""
    isolated_after: int = 2
    """After this many losses in a row, the request is computed alone, in engine steps of its own: it may have killed
    its replicas. One loss says little: every request on a replica that dies suffers it."""
    max_implicated: int = 2
    """The request is refused after this many replicas died while they computed it in isolation. One such death may be
    unrelated; two without a new token between them hardly are."""
    max_mismatches: int = 8
    """The choice fails after this many refusals by replicas with other weights (about 2.5 s). Until then it is tried
    again: a replica with its weights may exist that the router does not know yet."""
    first_backoff_s: float = 0.02
    """Wait before the second attempt. Resubmitting on a Serve handle reaches a live replica in under 20 ms."""
    max_backoff_s: float = 2.0


class AttemptHistory:
    """The attempts of one choice since its last new token."""

    def __init__(self, settings: FailoverSettings) -> None:
        self._settings = settings
        self.attempts = 0
        """Attempts that ended without the answer, for any reason; the pause before the next one grows with them."""
        self._lost = self._implicated = self._mismatches = 0

    def progress(self) -> None:
        """Note that an attempt brought new tokens before it ended: the request did not cause the earlier losses."""
        self.attempts = 1
        self._lost = self._implicated = self._mismatches = 0

    @property
    def isolate(self) -> bool:
        """Whether the next attempt is to be computed in engine steps of its own."""
        return self._lost >= self._settings.isolated_after

    def lost(self, *, counts: bool, implicated: bool) -> Failure | None:
        """Note a lost attempt. Returns the choice's failure if it was one too many.

        `counts`: towards `max_attempts`. `implicated`: the replica was computing this choice in isolation.
        """
        self.attempts += 1
        self._lost += counts
        self._implicated += implicated
        if self._implicated >= self._settings.max_implicated:
            blamed = f"{self._implicated} model replicas died while they computed only this request."
            return Failure(FailureCode.POISON, f"This request was refused: {blamed}")
        if self._lost < self._settings.max_attempts:
            return None
        message = (
            "The model's replica was lost and the answer could not be continued "
            f"(tried {self._lost} times). Repeat the request."
        )
        return Failure(FailureCode.REPLICA_LOST, message, retry_after_s=1.0)

    def refused(self, failure: Failure, *, accepted: bool) -> Failure | None:
        """Note a replica's refusal. Returns the choice's failure if no other attempt is to be made."""
        self.attempts += 1
        if failure.code is FailureCode.WRONG_WEIGHTS:
            self._mismatches += 1
            return failure if self._mismatches >= self._settings.max_mismatches else None
        return None if accepted and failure.code in _NO_PLACE_NOW else failure
