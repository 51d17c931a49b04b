"""Chooses the tokens of each step: which sequences compute how many of their tokens, and in which pages.

Uses no device and no clock. Every accepted sequence finishes: a single one always fits (larger requests are refused
before they get here), and when pages run out the youngest sequence gives its pages back and is recomputed later, before
new ones start. Which new one starts next is a matter of fairness between tenants (`serve_app.fair_queue`). A sequence
of a tenant that has more than its share yields to one of a tenant that has less, where there is no room for both. Batch
sequences start when no interactive one waits, and yield to those that come.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

from serve_app.engine.kv_cache import PagePool, page_hash, root_hash
from serve_app.engine.prompt_lookup import INDEXED_PER_STEP, ROW_COST, share_rows
from serve_app.engine.prompt_pace import PromptPace
from serve_app.engine.sequence import DraftPosition, Sequence
from serve_app.engine.tenant_shares import (
    YIELD_TOKENS,
    interactive_of_tenants,
    pausing_tenants,
    takes_part,
    yielding_to,
)
from serve_app.engine.waiting_line import WaitingLine, by_order

PAUSES = 3
"""Steps in a row in which tenants with more than their share may pause. In the long run every second one is such, at
most."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next `tokens` tokens of a sequence, to be computed in one step, and possibly a draft of what follows them."""

    sequence: Sequence
    tokens: int
    draft: tuple[int, ...] = ()
    """Guessed next ids, only where the chunk completes. They are computed after the chunk's tokens and then compared
    with the sampled ids."""

    @property
    def completes(self) -> bool:
        """Whether all the sequence's tokens are cached after this chunk, so that its next one can be sampled."""
        return self.tokens == self.sequence.remaining

    @property
    def kept(self) -> int:
        """How many rows of logits it needs, its last ones: those of its `scored` tokens, then those of `rows`.

        Scoring and `Scheduler.mark_computed` change it.
        """
        sequence = self.sequence
        end = sequence.computed + self.tokens
        return max(0, end - max(sequence.computed, sequence.first_row)) + len(self.draft)

    @property
    def scored(self) -> int:
        """How many of its rows give prompt logprobs, each of the prompt token that follows."""
        return self.kept - (1 + len(self.draft)) * self.completes

    def rows(self) -> list[Sequence | DraftPosition]:
        """The positions after which a completing chunk has tokens sampled: its end, and each guess."""
        draft = self.draft
        return [self.sequence, *(DraftPosition(self.sequence, draft[: n + 1]) for n in range(len(draft)))]


@dataclass(slots=True)
class _Step:
    """The chunks chosen so far for a step, and the tokens that are left for others."""

    budget: int
    """Tokens that are left."""
    rows: int
    """Rows of logits that are left: a step has no more than sequences may run. Its memory, and with batch invariance or
    CUDA graphs also its shape, depend on that."""
    chunks: dict[Sequence, Chunk] = field(default_factory=dict)
    """In the order of the step's tokens."""
    not_for_prompts: int = 0
    """Tokens of the budget that are kept from prompts, beside it while prompts are added."""


class Scheduler:
    """The waiting and the running sequences, and the pages that they hold."""

    def __init__(
        self,
        pool: PagePool,
        *,
        page_tokens: int,
        max_running: int,
        max_step_tokens: int,
        prompt_lookup: bool = False,
        row_cost: float = ROW_COST,
        pace: PromptPace | None = None,
    ) -> None:
        """`pace`: bounds the prompts of a step where several tenants ask. None: a step may be full of them."""
        self.pool = pool
        self.running: list[Sequence] = []
        self.line = WaitingLine()
        self.preemptions = 0
        self._page_tokens = page_tokens
        self.max_running = max_running
        self._max_step_tokens = max(max_step_tokens, max_running)
        self.prompt_lookup = prompt_lookup
        self._row_cost = row_cost
        self.pace = pace
        self._pauses_left = PAUSES

    @property
    def free_tokens(self) -> int:
        """Tokens of KV cache that no sequence holds."""
        return self.pool.available * self._page_tokens

    @property
    def uncomputed_tokens(self) -> int:
        """Tokens that the sequences have and that are not in the cache, but for the last one of each running one."""
        return self.line.tokens + sum(sequence.remaining - 1 for sequence in self.running)

    @property
    def waiting(self) -> list[Sequence]:
        """Those that wait for a place or for pages. `len(line)` costs less."""
        return list(self.line)

    def add(self, sequence: Sequence) -> None:
        """Let a new sequence wait."""
        self.line.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Drop a finished or cancelled sequence and give its pages back."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
            self.line.ended(sequence)
        else:
            self.line.drop(sequence)

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step: decodes first, then prompts as far as the token budget goes.

        An isolated sequence gets steps of its own, before the others.
        """
        step = _Step(self._max_step_tokens, self.max_running)
        # One whose mask is late and that was preempted since computes its prompt again, still alone.
        able = (s for s in self.running if s.isolated and not (s.held and s.remaining == 1))
        if (isolated := next(able, None)) is not None:
            self._add_chunk(isolated, min(isolated.remaining, step.budget), step)
            return list(step.chunks.values()) or self.schedule()
        preempted = self.preemptions
        if not self._fill_without_some(step):
            self._pauses_left = min(PAUSES, self._pauses_left + 1)
            self._decode(step)
            self._limit_prompts(step)
            self._prefill(step, admitting=self.preemptions == preempted)
        step.budget += step.not_for_prompts
        constrained = any(sequence.constraint is not None for sequence in step.chunks)
        if (self.prompt_lookup or constrained) and self.preemptions == preempted:
            self._add_drafts(step)
        return list(step.chunks.values())

    def _fill_without_some(self, step: _Step) -> bool:
        """Fill a step in which tenants pause that have more than their share, if somebody gets a first token sooner by
        that. Returns whether such a sequence is in it; otherwise others can be added."""
        if self.pace is None or self._pauses_left == 0 or not self.line.several_tenants:
            return False
        pausing = pausing_tenants(self.running, self.line.firsts())
        if not pausing:
            return False
        preempted = self.preemptions
        self._decode(step, pausing)
        self._limit_prompts(step, times=PAUSES)
        self._prefill(step, admitting=self.preemptions == preempted, pausing=pausing)
        if all(sequence.output_len > 0 for sequence in step.chunks):
            return False
        self._pauses_left -= 1
        return True

    def _decode(self, step: _Step, pausing: Collection[str] = ()) -> None:
        """Add the next token of each sequence that decodes."""
        able = (s for s in self.running if s.remaining == 1 and not s.held and s not in step.chunks)
        for sequence in sorted((s for s in able if takes_part(s, pausing)), key=by_order):
            if sequence in self.running and step.budget > 0:
                self._add_chunk(sequence, 1, step)

    def _limit_prompts(self, step: _Step, times: int = 1) -> None:
        """Leave the step short where another tenant's request may come while it runs. `times`: this often as much is
        left to prompts."""
        step.budget += step.not_for_prompts
        step.not_for_prompts = 0
        if self.pace is None or not self.line.several_tenants or len(self.running) + len(self.line) < 2:
            return
        if (most := self.pace.most(len(step.chunks))) is not None:
            step.not_for_prompts = max(0, step.budget - times * most)
            step.budget -= step.not_for_prompts

    def _prefill(self, step: _Step, *, admitting: bool, pausing: Collection[str] = ()) -> None:
        """Fill the rest of the budget with prompts in order: those under way and those that can be admitted."""
        able = (s for s in self.running if s.remaining > 1 and s not in step.chunks and takes_part(s, pausing))
        under_way = deque(sorted(able, key=by_order))
        before = self.preemptions
        while step.budget > 0:
            newcomer = self._newcomer(pausing) if admitting else None
            if newcomer is not None and (newcomer.batch or newcomer.yielded) and self.preemptions > before:
                newcomer = None  # it may just have yielded
            if newcomer is not None and not (under_way and under_way[0].order < newcomer.order):
                admitting = self._admit(newcomer, step)
                continue
            if not under_way:
                break
            sequence = under_way.popleft()
            if sequence in self.running and sequence not in step.chunks:
                preempted = self.preemptions
                self._add_chunk(sequence, min(sequence.remaining, step.budget), step)
                admitting = admitting and self.preemptions == preempted

    def _newcomer(self, pausing: Collection[str]) -> Sequence | None:
        """Who is to be admitted next."""
        if pausing:
            return self.line.next_of_others(pausing)
        return self.line.next(lambda: interactive_of_tenants(self.running))

    def _add_chunk(self, sequence: Sequence, tokens: int, step: _Step) -> None:
        """Add the sequence's next tokens, as far as there are rows of logits for them.

        While pages are missing the last sequence in order is preempted. A prompt whose last token would need a row that
        is not there gets it in the next step, where it comes first.
        """
        first_row = max(sequence.computed, sequence.first_row)
        tokens = min(tokens, first_row + step.rows - sequence.computed)
        if tokens <= 0:
            return
        while not self._reserve(sequence, tokens):
            victim = max(self.running, key=by_order)
            self._preempt(victim, step)
            if victim is sequence:
                return
        step.chunks[sequence] = chunk = Chunk(sequence, tokens)
        step.budget -= tokens
        step.rows -= chunk.kept

    def _admit(self, sequence: Sequence, step: _Step) -> bool:
        """Admit the first in the queue if it fits; returns whether the next one may be tried.

        Running sequences that make way for it are preempted.
        """
        while (prefix := self._fitting_prefix(sequence)) is None:
            if (victim := self._making_way(sequence)) is None:
                return False
            self._preempt(victim, step)
        self.pool.hold(prefix)
        sequence.pages = prefix
        sequence.computed = len(prefix) * self._page_tokens
        if sequence.preemptions == 0:
            sequence.cached_prompt_tokens = min(sequence.computed, sequence.prompt_len)
        self.line.leave(sequence)
        sequence.yielded = False
        self.running.append(sequence)
        if not (sequence.isolated and step.chunks):
            self._add_chunk(sequence, min(sequence.remaining, step.budget), step)
        if sequence.isolated and step.chunks:
            # No other sequence may be added. If this step already has others, the isolated one gets the next step.
            step.budget = step.not_for_prompts = 0
        return not sequence.isolated

    def _making_way(self, newcomer: Sequence) -> Sequence | None:
        """A running sequence to preempt for the newcomer: the last of those that yield, or one without output that
        comes later.

        They yield only if that makes enough room.
        """
        yielding = [] if newcomer.batch else yielding_to(newcomer, self.running)
        if yielding and self._fitting_prefix(newcomer, yielding) is not None:
            victim = max(yielding, key=by_order)
            victim.yields_from = victim.output_len + YIELD_TOKENS
            victim.yielded = not victim.batch
            return victim
        if newcomer.yielded:
            return None
        last = max((s for s in self.running if newcomer.batch or not s.batch), key=by_order, default=None)
        return None if last is None or last.output_len > 0 or last.order < newcomer.order else last

    def _fitting_prefix(self, newcomer: Sequence, without: Collection[Sequence] = ()) -> list[int] | None:
        """The cached pages of the newcomer's longest known prefix, or None when it can't run beside the others yet.

        `without`: as if these did not run, and shared none of their pages.

        One free page for each running sequence keeps the newcomer from being preempted at once. The pages are not held
        while it waits: holding and releasing them in each step would keep them in the cache at the expense of pages
        that others have used since.
        """
        running = len(self.running) - len(without)
        room = self.pool.available + sum(len(sequence.pages) for sequence in without) - running
        # The newcomer needs at least one page of its own: without room for it the look-up is skipped.
        if running and (running >= self.max_running or room < 1):
            return None
        first_row = newcomer.first_row  # it and what follows is left to compute
        self._hash_pages(newcomer, first_row)
        prefix = self.pool.lookup(newcomer.page_hashes[: first_row // self._page_tokens])
        own = self._pages_for(len(newcomer.token_ids)) - len(prefix)
        return prefix if not running or room - self.pool.idle(prefix) >= own else None

    def _add_drafts(self, step: _Step) -> None:
        """Add drafts to the sequences that decode, where rows, tokens and pages are left over.

        A step never has more rows of logits than sequences may run: guesses take the rows that are empty.
        """
        sampled = sum(chunk.completes for chunk in step.chunks.values())
        if step.rows > 0 and self.prompt_lookup:
            unindexed = INDEXED_PER_STEP
            for sequence in step.chunks:  # those that decode come first, then prompts
                unindexed -= sequence.index(unindexed)
        rows = min(step.rows, step.budget)
        decoding = [s for s, chunk in step.chunks.items() if chunk.tokens == 1 and chunk.completes]
        if rows <= 0 or not decoding:
            return
        guesses = [sequence.guesses(rows) for sequence in decoding]
        lengths = share_rows(guesses, rows, sampled, self._row_cost)
        for sequence, guessed, length in zip(decoding, guesses, lengths, strict=True):
            if fitting := self._room(sequence, length):
                step.chunks[sequence] = Chunk(sequence, 1, tuple(token_id for token_id, _ in guessed[:fitting]))
                step.budget -= fitting

    def _room(self, sequence: Sequence, length: int) -> int:
        """Reserve pages for a draft if a free page remains for each running sequence; returns how many ids fit."""
        missing = self._pages_for(sequence.computed + 1 + length) - len(sequence.pages)
        if self.pool.available - missing >= len(self.running):
            self._reserve(sequence, 1 + length)
        return min(length, len(sequence.pages) * self._page_tokens - sequence.computed - 1)

    def _hash_pages(self, sequence: Sequence, tokens: int) -> None:
        hashes, size = sequence.page_hashes, self._page_tokens
        for page in range(len(hashes), tokens // size):
            parent = hashes[-1] if hashes else root_hash(sequence.request.cache_salt)
            hashes.append(page_hash(parent, sequence.token_ids[page * size : (page + 1) * size]))

    def mark_computed(self, sequence: Sequence, tokens: int) -> None:
        """Count the sequence's next tokens as cached, after their step. Pages that became full may be shared."""
        first_page = sequence.computed // self._page_tokens
        sequence.computed += tokens
        self._hash_pages(sequence, sequence.computed)
        for page in range(first_page, sequence.computed // self._page_tokens):
            self.pool.publish(sequence.pages[page], sequence.page_hashes[page])

    def put_off(self, chunk: Chunk) -> None:
        """Count a chunk's tokens but the last as cached: what comes after it could not be sampled yet."""
        self.mark_computed(chunk.sequence, chunk.tokens - 1)
        self._trim(chunk.sequence)

    def accept_draft(self, sequence: Sequence, accepted: int) -> None:
        """Count the first `accepted` ids of the draft, which are tokens of the sequence by now, as cached too.

        Pages that hold only rejected guesses are given back.
        """
        self.mark_computed(sequence, accepted)
        self._trim(sequence)

    def discard_draft(self, sequence: Sequence) -> None:
        """Discard all that the sequence's step with a draft computed, and never draft for it again."""
        sequence.may_guess = False
        self._trim(sequence)

    def _trim(self, sequence: Sequence) -> None:
        """Give back pages beyond the computed tokens."""
        needed = self._pages_for(sequence.computed)
        self.pool.release(sequence.pages[needed:])
        del sequence.pages[needed:]

    def _reserve(self, sequence: Sequence, tokens: int) -> bool:
        missing = self._pages_for(sequence.computed + tokens) - len(sequence.pages)
        if missing > 0:
            pages = self.pool.allocate(missing, sequence.pages[-1] if sequence.pages else None)
            if pages is None:
                return False
            sequence.pages.extend(pages)
        return True

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self._page_tokens)

    def _preempt(self, sequence: Sequence, step: _Step) -> None:
        if (chunk := step.chunks.pop(sequence, None)) is not None:
            step.budget += chunk.tokens
            step.rows += chunk.kept
        self.running.remove(sequence)
        self._release(sequence)
        sequence.preemptions += 1
        self.preemptions += 1
        self.line.come_back(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages)
        sequence.pages = []
        sequence.computed = 0
