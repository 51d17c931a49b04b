"""Which tokens of which sequences are computed in the next step.

A function of its own state only: no device, no clock. Every accepted sequence finishes: one alone always fits (larger
requests are refused before they get here), and when pages run out the youngest gives its pages back and is recomputed.
"""

from __future__ import annotations

import bisect
from collections import deque
from dataclasses import dataclass, field

from serve_app.engine.kv_cache import PagePool, page_hash, root_hash
from serve_app.engine.prompt_lookup import READ_AT_ONCE, ROW_COST, share_rows
from serve_app.engine.sequence import Sequence, Supposed


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next `tokens` tokens of a sequence, to be computed in one step, and perhaps guesses of what follows them."""

    sequence: Sequence
    tokens: int
    draft: tuple[int, ...] = ()
    """Guessed next ids, only where the chunk completes: computed behind its tokens, to be checked against the sampled
    ones."""

    @property
    def completes(self) -> bool:
        """After it every token is cached, so that the next one can be sampled."""
        return self.tokens == self.sequence.remaining

    def rows(self) -> list[Sequence | Supposed]:
        """What the rows of logits of a chunk that completes are sampled for: its end, and after each guess."""
        guesses = self.draft
        return [self.sequence, *(Supposed(self.sequence, guesses[: n + 1]) for n in range(len(guesses)))]


@dataclass(slots=True)
class _Step:
    """A step being put together."""

    budget: int
    chunks: list[Chunk] = field(default_factory=list)

    def add(self, sequence: Sequence, tokens: int) -> None:
        self.chunks.append(Chunk(sequence, tokens))
        self.budget -= tokens

    def holds(self, sequence: Sequence) -> bool:
        return any(chunk.sequence is sequence for chunk in self.chunks)

    def drop(self, sequence: Sequence) -> None:
        for chunk in self.chunks:
            if chunk.sequence is sequence:
                self.chunks.remove(chunk)
                self.budget += chunk.tokens
                return


class Scheduler:
    """Waiting and running sequences, and the pages they hold."""

    def __init__(
        self,
        pool: PagePool,
        *,
        page_tokens: int,
        max_running: int,
        max_step_tokens: int,
        prompt_lookup: bool = False,
        row_cost: float = ROW_COST,
    ) -> None:
        self.pool = pool
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._page_tokens = page_tokens
        self._max_running = max_running
        self._max_step_tokens = max(max_step_tokens, max_running)
        self.prompt_lookup = prompt_lookup
        self._row_cost = row_cost

    def add(self, sequence: Sequence) -> None:
        bisect.insort(self.waiting, sequence, key=_order)

    def remove(self, sequence: Sequence) -> None:
        """Forget a finished or cancelled sequence and give its pages back."""
        self._release(sequence)
        (self.running if sequence in self.running else self.waiting).remove(sequence)

    def plan(self) -> list[Chunk]:
        """The next step: decodes first, then prompts under what the token budget leaves.

        A sequence that must be alone gets steps of its own first.
        """
        step = _Step(self._max_step_tokens)
        if (suspect := next((s for s in self.running if s.isolated), None)) is not None:
            self._schedule(suspect, min(suspect.remaining, step.budget), step)
            return step.chunks or self.plan()
        preempted = self.preemptions
        for sequence in sorted((s for s in self.running if s.remaining == 1), key=_order):
            if sequence in self.running and step.budget > 0:
                self._schedule(sequence, 1, step)
        self._prefill(step, admitting=self.preemptions == preempted)
        if self.prompt_lookup and self.preemptions == preempted:
            self._add_drafts(step)
        return step.chunks

    def _prefill(self, step: _Step, *, admitting: bool) -> None:
        """Prompts under what the budget leaves, in order, be they under way or yet to be admitted."""
        under_way = deque(sorted((s for s in self.running if s.remaining > 1), key=_order))
        while step.budget > 0 and (under_way or (admitting and self.waiting)):
            if admitting and self.waiting and not (under_way and under_way[0].order < self.waiting[0].order):
                admitting = self._admit(self.waiting[0], step)
                continue
            sequence = under_way.popleft()
            if sequence in self.running and not step.holds(sequence):
                preempted = self.preemptions
                self._schedule(sequence, min(sequence.remaining, step.budget), step)
                admitting = admitting and self.preemptions == preempted

    def _schedule(self, sequence: Sequence, tokens: int, step: _Step) -> None:
        while not self._reserve(sequence, tokens):
            victim = max(self.running, key=_order)
            step.drop(victim)
            self._preempt(victim)
            if victim is sequence:
                return
        step.add(sequence, tokens)

    def _admit(self, sequence: Sequence, step: _Step) -> bool:
        """Let the first in the queue run, if it can; whether another may be tried."""
        while (prefix := self._fitting_prefix(sequence)) is None:
            if not self._make_way(sequence, step):
                return False
        self._take_prefix(sequence, prefix)
        if sequence.preemptions == 0:
            sequence.cached_prompt_tokens = min(sequence.computed, sequence.prompt_len)
        self.waiting.remove(sequence)
        self.running.append(sequence)
        if not (sequence.isolated and step.chunks):
            self._schedule(sequence, min(sequence.remaining, step.budget), step)
        if sequence.isolated and step.chunks:
            # Either the step is its own now, or the next one will be: nothing more goes into this one.
            step.budget = 0
        return not sequence.isolated

    def _fitting_prefix(self, newcomer: Sequence) -> list[int] | None:
        """The cached pages of its longest known prefix, if with them it may run beside those that do; else None.

        A page of slack for each keeps it from being preempted at once. The pages are only looked at: held and given
        back each step while it waits, they would outlive those that others used meanwhile.
        """
        running = len(self.running)
        room = self.pool.available - running
        # One page at least is its own, whatever it shares: a full house costs no look-up.
        if running and (running >= self._max_running or room < 1):
            return None
        prefix = self._known_prefix(newcomer)
        own = self._pages_for(len(newcomer.token_ids)) - len(prefix)
        return prefix if not running or room - self.pool.idle(prefix) >= own else None

    def _make_way(self, newcomer: Sequence, step: _Step) -> bool:
        """Send one back to the queue that has not begun and comes after the newcomer, if there is one."""
        last = max(self.running, key=_order)
        if last.output_len > 0 or last.order < newcomer.order:
            return False
        step.drop(last)
        self._preempt(last)
        return True

    def _add_drafts(self, step: _Step) -> None:
        """Let sequences that decode guess ahead, in rows, tokens and pages that nobody else needs.

        A step never has more rows of logits than requests may run: guesses take the places that are empty.
        """
        sampled = sum(chunk.completes for chunk in step.chunks)
        empty = self._max_running - sampled
        if empty > 0:
            self._read(step)
        rows = min(empty, step.budget)
        decoding = [place for place, chunk in enumerate(step.chunks) if chunk.tokens == 1 and chunk.completes]
        if rows <= 0 or not decoding:
            return
        guesses = [step.chunks[place].sequence.guesses(rows) for place in decoding]
        lengths = share_rows(guesses, rows, sampled, self._row_cost)
        for place, guessed, length in zip(decoding, guesses, lengths, strict=True):
            sequence = step.chunks[place].sequence
            if fitting := self._room(sequence, length):
                step.chunks[place] = Chunk(sequence, 1, tuple(token_id for token_id, _ in guessed[:fitting]))
                step.budget -= fitting

    def _read(self, step: _Step) -> None:
        """Let the step's sequences get to know their ids: those that decode first, then prompts while computed."""
        left = READ_AT_ONCE
        for chunk in step.chunks:
            left -= chunk.sequence.read(left)

    def _room(self, sequence: Sequence, length: int) -> int:
        """Take pages for a draft as long as each running sequence could still have one; how much of it fits."""
        missing = self._pages_for(sequence.computed + 1 + length) - len(sequence.pages)
        if self.pool.available - missing >= len(self.running):
            self._reserve(sequence, 1 + length)
        return min(length, len(sequence.pages) * self._page_tokens - sequence.computed - 1)

    def _known_prefix(self, sequence: Sequence) -> list[int]:
        """The cached pages of its longest known prefix; one token at least is left to compute."""
        self._name_pages(sequence, len(sequence.token_ids) - 1)
        return self.pool.lookup(sequence.page_hashes)

    def _take_prefix(self, sequence: Sequence, pages: list[int]) -> None:
        self.pool.hold(pages)
        sequence.pages = pages
        sequence.computed = len(pages) * self._page_tokens

    def _name_pages(self, sequence: Sequence, tokens: int) -> None:
        names, size = sequence.page_hashes, self._page_tokens
        for page in range(len(names), tokens // size):
            parent = names[-1] if names else root_hash(sequence.request.cache_salt)
            names.append(page_hash(parent, sequence.token_ids[page * size : (page + 1) * size]))

    def computed(self, chunk: Chunk) -> None:
        """The step is done: these tokens are in the cache, and full pages may be shared from now on."""
        self._advance(chunk.sequence, chunk.tokens)

    def verified(self, sequence: Sequence, agreed: int) -> None:
        """So many guesses behind a computed chunk were right, and are tokens of the sequence by now.

        What was computed for the others is forgotten, and pages that held nothing else are given back.
        """
        self._advance(sequence, agreed)
        self._trim(sequence)

    def spoiled(self, chunk: Chunk) -> None:
        """Nothing that was computed for this chunk may be used; its sequence gets no guesses any more."""
        chunk.sequence.may_guess = False
        self._trim(chunk.sequence)

    def _trim(self, sequence: Sequence) -> None:
        needed = self._pages_for(sequence.computed)
        self.pool.release(sequence.pages[needed:])
        del sequence.pages[needed:]

    def _advance(self, sequence: Sequence, tokens: int) -> None:
        first_page = sequence.computed // self._page_tokens
        sequence.computed += tokens
        self._name_pages(sequence, sequence.computed)
        for page in range(first_page, sequence.computed // self._page_tokens):
            self.pool.publish(sequence.pages[page], sequence.page_hashes[page])

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

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.preemptions += 1
        self.preemptions += 1
        self.add(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages)
        sequence.pages = []
        sequence.computed = 0


def _order(sequence: Sequence) -> tuple[bool, int]:
    return sequence.order
