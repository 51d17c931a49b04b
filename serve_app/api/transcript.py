"""A resumable stream's text and events: the `resume.transcript.Transcript` of one plan in one wire format.

Promises the same events for the same ids, whatever the batches, attempts and ingresses they came by: a token at a time,
choices taking turns, and the end of a choice a turn of its own. Pure: no I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from zlib import crc32

from serve_app.api.errors import from_failure
from serve_app.api.events import EventWriter
from serve_app.chat.tokenizer import ChatTokenizer
from serve_app.core import Failure, FinishReason, GenerationStats, TokenBatch
from serve_app.generation.output_tokens import Journal
from serve_app.generation.service import Plan, Usage, choice_texts
from serve_app.generation.text import Delta
from serve_app.resume.transcript import Event


class Transcript:
    """See `resume.transcript.Transcript`.

    Several choices go round by round: token i of each that has not ended, then token i + 1. So the order of events
    does not depend on which choice was faster, and costs at most the wait for the slowest.
    """

    def __init__(self, plan: Plan, new_writer: Callable[[], EventWriter], tokenizer: ChatTokenizer) -> None:
        """Raises `ApiError` for stop strings that can't be used."""
        self._plan = plan
        self._new_writer = new_writer
        self._tokenizer = tokenizer
        self._writer = new_writer()
        self._texts = choice_texts(plan, tokenizer)
        self._outputs = [
            Journal(request.max_new_tokens, with_logprobs=request.sampling.logprobs is not None)
            for request in plan.requests
        ]
        self._told = [0] * plan.choices
        """Tokens of each choice whose events are out."""
        self._last_words: list[FinishReason | None] = [None] * plan.choices
        self._stats: list[GenerationStats | None] = [None] * plan.choices
        """Of the attempt that began each choice."""
        self._ended = [False] * plan.choices
        self._failure: Failure | None = None
        self._turn = 0
        self._digest = 0
        """Of what was told: see `Event`. A CRC, since nobody gains by two texts that have the same."""
        self.finished = False
        """See the protocol."""
        self.tokens = 0
        """See the protocol."""
        self.outcome = ""
        """The finish reason or error code that came last."""

    @property
    def cached_prompt_tokens(self) -> int:
        """See the protocol. Of each prompt's first choice."""
        counted = self._stats[:: self._plan.choices_per_prompt]
        return sum(stats.cached_prompt_tokens for stats in counted if stats is not None)

    def opening(self) -> list[Event]:
        """See the protocol."""
        return self._marked(self._writer.opened())

    def push(self, choice: int, batch: TokenBatch) -> list[Event]:
        """See the protocol."""
        if self.finished or self._ended[choice]:
            return []
        known = len(self._outputs[choice])
        self._outputs[choice].append(batch)
        self.tokens += len(self._outputs[choice]) - known
        if batch.finish_reason is not None:
            self._last_words[choice] = batch.finish_reason
        self._stats[choice] = self._stats[choice] or batch.stats  # of who took it over they count no more
        return self._advance()

    def fail(self, failure: Failure) -> list[Event]:
        """See the protocol."""
        self.finished = True
        self._failure = failure
        error = from_failure(failure)
        self.outcome = error.code or error.type
        self._roll(b"failed")
        return self._marked([self._writer.failed(error)])

    def again(self) -> Iterator[Event]:
        """See the protocol."""
        other = Transcript(self._plan, self._new_writer, self._tokenizer)
        yield from other.opening()
        more = True
        while more:
            more = False
            for choice in range(self._plan.choices):
                batch = self._next_batch(other, choice)
                if batch is not None:
                    more = True
                    yield from other.push(choice, batch)
        if self._failure is not None:
            yield from other.fail(self._failure)

    def _next_batch(self, other: Transcript, choice: int) -> TokenBatch | None:
        """What `other`, which makes the events again, lacks next of this choice."""
        output, told = self._outputs[choice], len(other._outputs[choice])
        if other._ended[choice]:
            return None
        if told < len(output):
            logprobs = (output.logprobs[told],) if output.logprobs else None
            return TokenBatch(told, (output.token_ids[told],), logprobs, stats=self._stats[choice])
        reason = self._last_words[choice]
        return None if reason is None or other._last_words[choice] else TokenBatch(told, finish_reason=reason)

    def ended(self, choice: int) -> bool:
        """See the protocol."""
        return self._ended[choice]

    def output(self, choice: int) -> TokenBatch:
        """See the protocol."""
        journal = self._outputs[choice]
        with_logprobs = self._plan.requests[choice].sampling.logprobs is not None
        logprobs = tuple(journal.logprobs) if with_logprobs else None
        return TokenBatch(0, tuple(journal.token_ids), logprobs, stats=self._stats[choice])

    def _advance(self) -> list[Event]:
        """The events of all turns that can be taken now."""
        events: list[Event] = []
        while not self.finished and (delta := self._next_delta(self._turn)) is not None:
            events += self._marked(self._writer.gained(delta))
            if delta.finish_reason is not None:
                self._ended[self._turn] = True
                self.outcome = delta.finish_reason
            if all(self._ended):
                self.finished = True
                tokens = sum(text.tokens for text in self._texts)
                usage = Usage(self._plan.prompt_tokens, self.cached_prompt_tokens, tokens)
                events += self._marked(self._writer.ended(usage))
            else:
                self._pass_on()
        return events

    def _pass_on(self) -> None:
        """The next choice that has not ended has its turn."""
        self._turn = (self._turn + 1) % len(self._ended)
        while self._ended[self._turn]:
            self._turn = (self._turn + 1) % len(self._ended)

    def _next_delta(self, choice: int) -> Delta | None:
        """What the choice says in its turn; None when that has not come yet."""
        output, told = self._outputs[choice], self._told[choice]
        if told < len(output):
            self._told[choice] += 1
            self._roll(b"%d %d" % (choice, output.token_ids[told]))
            logprobs = (output.logprobs[told],) if output.logprobs else None
            return self._texts[choice].push(TokenBatch(told, (output.token_ids[told],), logprobs))
        reason = self._last_words[choice]
        if reason is None:
            return None
        self._roll(b"%d %b" % (choice, reason.encode()))
        return self._texts[choice].push(TokenBatch(told, finish_reason=reason))

    def _roll(self, told: bytes) -> None:
        self._digest = crc32(told, self._digest)

    def _marked(self, events: Iterable[bytes]) -> list[Event]:
        return [Event(content, self._digest) for content in events]
