"""The engine's step: schedule, run, sample, and what each sequence gained.

Knows no threads, no event loops and no callers; its methods are called one at a time. The serving engine and the checks
at load drive the same steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import torch

from serve_app.core import Failure, FailureCode, FinishReason, GenerationRequest, ReplicaLoad, Reply, TokenBatch
from serve_app.engine.load import LoadMeter
from serve_app.engine.masks import MaskBuilder, Place, StepMasks, wait_for_any
from serve_app.engine.model_runner import ModelRunner
from serve_app.engine.prompt_lookup import count_accepted
from serve_app.engine.sampling import NO_TOKEN, NOT_A_NUMBER, Sampled, Sampler
from serve_app.engine.scheduler import Chunk, Scheduler
from serve_app.engine.sequence import Sequence

HELD_WAIT_S = 0.01
"""How long a step that has nothing to compute waits for the masks that all its sequences need."""
Gain = tuple[Sequence, Reply]
"""New tokens of a sequence, or the failure that ends it."""


@dataclass(slots=True)
class StepCounters:
    """Totals since the start. A prompt counts when its first step begins."""

    steps: int = 0
    prefill_steps: int = 0
    """Of the steps, those that computed prompts, beside decodes or alone."""
    step_s: float = 0.0
    prefill_step_s: float = 0.0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    """Prompt tokens that were taken from the cache instead of computed."""
    output_tokens: int = 0
    drafted_tokens: int = 0
    """Output tokens that were guessed and verified in a step; `accepted_tokens` of them were right."""
    accepted_tokens: int = 0


class EngineCore:
    """Continuous batching over one model: the runner, the scheduler with its pages, the sampler and the counters."""

    def __init__(
        self,
        runner: ModelRunner,
        scheduler: Scheduler,
        sampler: Sampler,
        *,
        numerics_id: str = "",
        mask_threads: int = 1,
        before_isolated: Callable[[GenerationRequest], None] = lambda request: None,
    ) -> None:
        """Drive `runner` with the steps that `scheduler` chooses.

        Args:
            numerics_id: goes into the stats of each sequence.
            mask_threads: threads that compute the masks of grammars.
            before_isolated: called with the request before each step that holds an isolated sequence.
        """
        self.runner = runner
        self.scheduler = scheduler
        self.sampler = sampler
        self.counters = StepCounters()
        self.meter = LoadMeter()
        self.step_started: float | None = None
        """When the step that is being computed began, on the monotonic clock; None between steps."""
        self._masks = MaskBuilder(runner.vocab_size, mask_threads)
        self._numerics_id = numerics_id
        self._before_isolated = before_isolated

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.line)

    def load(self) -> ReplicaLoad:
        """What there is to do at the moment."""
        scheduler = self.scheduler
        return ReplicaLoad(
            running=len(scheduler.running),
            waiting=len(scheduler.line),
            places=scheduler.max_running,
            free_tokens=scheduler.free_tokens,
            waiting_tokens=scheduler.uncomputed_tokens,
            tokens_per_s=self.meter.tokens_per_s,
            seconds_per_request=self.meter.seconds_per_request,
        )

    def retry_after_s(self) -> float:
        """Seconds in which an eighth of the waiting sequences will have started, at the pace of those that ended last.

        At least 1.
        """
        return max(1.0, len(self.scheduler.line) / 8 * self.meter.seconds_per_request / self.scheduler.max_running)

    def expire(self) -> list[Gain]:
        """Drop the sequences whose deadline has passed; returns a failure for each."""
        now = time.monotonic()
        unfinished = (*self.scheduler.running, *self.scheduler.line)
        late = [sequence for sequence in unfinished if sequence.deadline is not None and sequence.deadline <= now]
        for sequence in late:
            self.remove(sequence)
        return [(s, deadline_exceeded()) for s in late]

    def remove(self, sequence: Sequence) -> None:
        """Drop a sequence that has ended or that nobody waits for any more."""
        self.scheduler.remove(sequence)
        if sequence.started_at is not None:
            self.meter.ended(time.monotonic() - sequence.started_at)

    def step(self, meanwhile: Callable[[], None] = lambda: None) -> list[Gain]:
        """Compute the next step; returns what its sequences gained. Sequences that ended are dropped.

        Args:
            meanwhile: the caller's work, to be done while the device computes. It is called after the step's launch,
                and also before it unless the step is replayed from a graph: other launches keep this thread busy.
        """
        begun, made = time.monotonic(), self.counters.output_tokens
        chunks = self.scheduler.schedule()
        if not self.runner.replays(chunks):
            meanwhile()
        if not chunks:
            wait_for_any((s.constraint for s in self.scheduler.running if s.constraint is not None), HELD_WAIT_S)
            return []
        self._begin(chunks)
        masks = self._start_masks(chunks)
        logits = self.runner.step(chunks)
        meanwhile()
        logits = self._score(chunks, logits)
        gains = self._collect(chunks, self._sample(chunks, logits, masks))
        self._finish(gains)
        seconds = time.monotonic() - begun
        self.meter.step(seconds, self.counters.output_tokens - made)
        decodes = sum(chunk.tokens == 1 for chunk in chunks)
        self.counters.step_s += seconds
        if decodes < len(chunks):
            self.counters.prefill_steps += 1
            self.counters.prefill_step_s += seconds
        if self.scheduler.pace is not None:
            self.scheduler.pace.took(seconds, sum(chunk.tokens + len(chunk.draft) for chunk in chunks), decodes)
        return gains

    def _begin(self, chunks: list[Chunk]) -> None:
        if chunks[0].sequence.isolated:
            self._before_isolated(chunks[0].sequence.request)
        self.step_started = now = time.monotonic()
        for sequence in (chunk.sequence for chunk in chunks):
            if sequence.started_at is None:
                sequence.started_at = now
                self.counters.prompt_tokens += sequence.prompt_len
                self.counters.cached_prompt_tokens += sequence.cached_prompt_tokens

    def _score(self, chunks: list[Chunk], logits: torch.Tensor) -> torch.Tensor:
        """Take the prompts' logprobs from the step's logits; returns the rows that are to be sampled."""
        if not any(chunk.scored for chunk in chunks):
            return logits
        sampled: list[int] = []
        row = 0
        for chunk in chunks:
            sequence, scored, end = chunk.sequence, chunk.scored, row + chunk.kept
            if scored and sequence.prompt_scores is not None:
                sequence.prompt_scores.add(logits[row : row + scored], sequence.request.prompt_token_ids)
            sampled.extend(range(row + scored, end))
            row = end
        return logits[sampled]

    def _start_masks(self, chunks: list[Chunk]) -> StepMasks | None:
        """Begin the masks of the step's rows that have a grammar; None if none has."""
        places: list[Place] = []
        row = 0
        for chunk in chunks:
            if chunk.completes:
                if chunk.sequence.constraint is not None:
                    places.append(Place(row, chunk.sequence.constraint, chunk.draft))
                row += 1 + len(chunk.draft)
        return self._masks.start(places) if places else None

    def _sample(
        self, chunks: list[Chunk], logits: torch.Tensor, started: StepMasks | None
    ) -> dict[Sequence, list[Sampled]]:
        """For each chunk that completes: the token after its end, and the one after each id of its draft.

        A chunk whose mask is late has none: its sequence's last token is computed again in a later step.
        """
        ready = [chunk for chunk in chunks if chunk.completes]
        if not ready:
            return {}
        masks = None
        if started is not None:
            others = len(ready) < len(chunks) or any(chunk.sequence.constraint is None for chunk in ready)
            masks = started.collect(others=others)
            if masks.late:
                ready, logits = _without(masks.late, ready, logits)
                if not ready:
                    return {}
        rows = [row for chunk in ready for row in chunk.rows()]
        sampled = iter(self.sampler.sample(logits, rows, masks if masks is not None and masks.rows else None))
        return {chunk.sequence: list(islice(sampled, 1 + len(chunk.draft))) for chunk in ready}

    def _collect(self, chunks: list[Chunk], sampled: dict[Sequence, list[Sampled]]) -> list[Gain]:
        """Append what was sampled to the sequences."""
        ready = [chunk for chunk in chunks if chunk.sequence in sampled]
        for chunk in chunks:
            if chunk.completes and chunk.sequence not in sampled:
                self.scheduler.put_off(chunk)
            elif chunk.draft and any(choice.token_id == NOT_A_NUMBER for choice in sampled[chunk.sequence]):
                # A wrong guess may be the cause: the sequence computes its token again, without a draft.
                ready.remove(chunk)
                self.scheduler.discard_draft(chunk.sequence)
            else:
                self.scheduler.mark_computed(chunk.sequence, chunk.tokens)
        now = time.monotonic()
        return [(chunk.sequence, self._advance(chunk, sampled[chunk.sequence], now)) for chunk in ready]

    def _advance(self, chunk: Chunk, sampled: list[Sampled], now: float) -> Reply:
        """Append a chunk's sampled tokens, as far as its draft was right and nothing ends the output."""
        scores = chunk.sequence.prompt_scores
        if sampled[0].token_id == NOT_A_NUMBER or (scores is not None and not scores.are_numbers):
            return Failure(FailureCode.ENGINE_FAILED, "the model's output is not a number; the request can't be served")
        sequence, index = chunk.sequence, chunk.sequence.output_len
        if sequence.first_token_at is None:
            sequence.first_token_at = now
        reason = sequence.request.finish_reason(index, None)  # at once if no token is wanted
        if sampled[0].token_id == NO_TOKEN and reason is None:
            if (failed := sequence.constraint.failed if sequence.constraint is not None else None) is not None:
                return Failure(FailureCode.INVALID_REQUEST, failed)
            reason = FinishReason.STOP
        accepted = count_accepted(chunk.draft, [choice.token_id for choice in sampled])
        kept: list[Sampled] = []
        while reason is None and len(kept) <= accepted and sampled[len(kept)].token_id != NO_TOKEN:
            kept.append(sampled[len(kept)])
            reason = sequence.append(kept[-1].token_id)
        if chunk.draft:
            accepted = min(accepted, len(kept))
            # Where no id may come after the draft, its last one is computed again: that step ends the output.
            again = reason is None and len(kept) == accepted
            self.scheduler.accept_draft(sequence, accepted - again)
            self.counters.drafted_tokens += len(chunk.draft)
            self.counters.accepted_tokens += accepted
        self.counters.output_tokens += len(kept)
        ids = tuple(choice.token_id for choice in kept)
        logprobs = tuple(choice.logprobs for choice in kept if choice.logprobs is not None) or None
        stats = None
        if reason is not None or index == len(sequence.request.output_token_ids):
            stats = sequence.stats(now, self._numerics_id)
        of_prompt = None
        if scores is not None:  # they are sent once
            of_prompt, sequence.prompt_scores = scores.packed(), None
        return TokenBatch(index, ids, logprobs, reason, stats, of_prompt)

    def _finish(self, gains: list[Gain]) -> None:
        for sequence, reply in gains:
            if ends(reply):
                self.remove(sequence)
        self.counters.steps += 1
        self.step_started = None


def _without(late: frozenset[int], chunks: list[Chunk], logits: torch.Tensor) -> tuple[list[Chunk], torch.Tensor]:
    """The chunks, and their rows of logits, whose rows are not late."""
    kept: list[Chunk] = []
    row = 0
    for chunk in chunks:
        if row not in late:
            kept.append(chunk)
        row += 1 + len(chunk.draft)
    return kept, logits[[number for number in range(row) if number not in late]]


def deadline_exceeded() -> Failure:
    """For a request whose deadline has passed."""
    return Failure(FailureCode.DEADLINE_EXCEEDED, "the request's time is over")


def ends(reply: Reply) -> bool:
    """Whether this reply is the last one of its request."""
    return isinstance(reply, Failure) or reply.finish_reason is not None
