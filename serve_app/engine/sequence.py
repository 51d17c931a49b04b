"""One request inside the engine: its tokens, how many of them are in the KV cache, and its pages.

Owned by the engine's thread. Knows no device and no caller.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from serve_app.core import FinishReason, GenerationRequest, GenerationStats, Priority
from serve_app.engine.constraint import Constraint
from serve_app.engine.prompt_logprobs import PromptScores
from serve_app.engine.prompt_lookup import Lookup


@dataclass(slots=True, eq=False)
class Sequence:
    """The state of one attempt. `token_ids` is prompt plus output; the first `computed` of them are in the KV cache."""

    request: GenerationRequest
    arrival: int
    """Rises with each request."""
    batch: bool = field(init=False)
    """Whether it yields to interactive sequences."""
    turn: tuple[int, int] = field(init=False)
    """Rises with each sequence that starts: the arrival, unless one that arrived later has started before this one."""
    deadline: float | None = None
    """On this process's monotonic clock."""
    token_ids: list[int] = field(default_factory=list)
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    page_hashes: list[bytes] = field(default_factory=list)
    """Chained hashes of its full pages of tokens, from the first page on; more are added when they are needed."""
    submitted_at: float = field(default_factory=time.monotonic)
    started_at: float | None = None
    first_token_at: float | None = None
    cached_prompt_tokens: int = 0
    preemptions: int = 0
    yields_from: int = 0
    """Tokens of output from which it may be preempted for a sequence of a higher class, or of a tenant that has less
    than its share."""
    yielded: bool = False
    """It was preempted for a sequence of another tenant, and waits."""
    lookup: Lookup | None = None
    """Made when a step first has a free row for guesses."""
    may_guess: bool = True
    """False once a draft has been discarded."""
    constraint: Constraint | None = None
    """Where the request's grammar stands after the output; None without a grammar. It is kept through preemptions."""
    prompt_scores: PromptScores | None = None
    """The prompt's logprobs so far; None if they are not wanted, or were sent."""

    def __post_init__(self) -> None:
        request = self.request
        self.batch, self.turn = request.priority is Priority.BATCH, (self.arrival, 0)
        self.token_ids = [*request.prompt_token_ids, *request.output_token_ids]
        if request.needs_prompt_logprobs:
            self.prompt_scores = PromptScores(request.prompt_logprobs or 0)

    @property
    def order(self) -> tuple[bool, bool, tuple[int, int]]:
        """Sort key: interactive sequences come before batch, then those with output before those without, then by turn.

        So a stream that a failover brought here continues before new ones begin, and preemption takes pages from batch
        and from new ones first. The key changes with the first token.
        """
        return (self.batch, self.output_len == 0, self.turn)

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def output_len(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_token_ids)

    @property
    def isolated(self) -> bool:
        """Its steps may hold no other sequence, until its first new token."""
        return self.request.isolated and self.output_len == len(self.request.output_token_ids)

    @property
    def remaining(self) -> int:
        """Tokens not yet in the cache: 1 while decoding, more while prefilling."""
        return len(self.token_ids) - self.computed

    @property
    def held(self) -> bool:
        """Whether it waits for a mask of its grammar. Unless preempted since, only its last token is not cached."""
        return self.constraint is not None and self.constraint.held

    @property
    def first_row(self) -> int:
        """The first position whose logits are still to be computed: pages before it may come from the cache.

        It is the last token's, whose logits give the next one, or the one before the first prompt token without a
        logprob.
        """
        scores = self.prompt_scores
        if scores is not None and len(scores) < self.prompt_len - 1:
            return len(scores)
        return len(self.token_ids) - 1

    def append(self, token_id: int) -> FinishReason | None:
        """Add a sampled token; returns why the sequence ends with it, or None."""
        self.token_ids.append(token_id)
        reason = self.request.finish_reason(self.output_len, token_id)
        if self.constraint is not None and reason is not FinishReason.STOP:
            self.constraint.advance((token_id,))
            if self.constraint.complete:
                return FinishReason.STOP
        return reason

    def index(self, most: int) -> int:
        """Index up to `most` more of its ids for guessing; returns how many."""
        if not self.may_guess:
            return 0
        if self.lookup is None:
            self.lookup = Lookup(self.token_ids, self.request.predicted_token_ids, self.prompt_len)
        return self.lookup.index(most)

    def guesses(self, count: int) -> list[tuple[int, float]]:
        """Up to `count` guessed next ids with their probabilities (`Lookup.guess`). None would end the output.

        What a grammar forces is certain; what it forbids is cut.
        """
        # The step also samples the id after the last guess, which must still belong to the output.
        count = min(count, self.request.max_new_tokens - self.output_len - 1)
        if not self.may_guess or count <= 0:
            return []
        constraint, stops = self.constraint, self.request.stop_token_ids
        if constraint is not None and (constraint.pending is not None or constraint.watched):
            return []  # its mask is there already, or its grammar is too slow to be asked here
        if constraint is not None and (forced := constraint.forced()):
            guesses = [(token_id, 1.0) for token_id in forced[:count]]
        else:
            guesses = self.lookup.guess(count) if self.lookup is not None else []
            if constraint is not None and guesses:
                guesses = guesses[: constraint.allowed([token_id for token_id, _ in guesses])]
        return guesses[: next((place for place, (token_id, _) in enumerate(guesses) if token_id in stops), None)]

    def stats(self, now: float, numerics_id: str) -> GenerationStats:
        started = self.started_at if self.started_at is not None else now
        first = self.first_token_at if self.first_token_at is not None else now
        return GenerationStats(
            cached_prompt_tokens=self.cached_prompt_tokens,
            queued_s=started - self.submitted_at,
            prefill_s=first - started,
            decode_s=now - first,
            preemptions=self.preemptions,
            numerics_id=numerics_id,
        )


@dataclass(frozen=True, slots=True)
class DraftPosition:
    """A position behind a sequence's last token: the sequence extended by the first ids of its draft.

    The row of logits that is computed there is sampled as if those ids were its output.
    """

    sequence: Sequence
    draft: SequenceOf[int]

    @property
    def request(self) -> GenerationRequest:
        return self.sequence.request

    @property
    def token_ids(self) -> list[int]:
        return [*self.sequence.token_ids, *self.draft]

    @property
    def prompt_len(self) -> int:
        return self.sequence.prompt_len

    @property
    def output_len(self) -> int:
        return self.sequence.output_len + len(self.draft)
