"""The numbered events of a resumable stream: one completion in one wire format.

Promises the same events for the same token ids, whatever batches, attempts and ingresses they came from: one token an
event, choices in turns, and the end of a choice in an event of its own. Pure: no I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple
from zlib import crc32

from msgspec.structs import replace

from serve_app.chat.tokenizer import ChatTokenizer
from serve_app.core import Failure, RequestError, TokenBatch
from serve_app.generation.completion import Completion
from serve_app.generation.events import EventWriter
from serve_app.generation.output_tokens import OutputTokens
from serve_app.generation.request import ResolvedRequest
from serve_app.generation.text import Delta


class Event(NamedTuple):
    """One event, as a client gets it."""

    content: bytes
    digest: int
    """A CRC-32 of all tokens up to here. Equal for equal texts, and almost never equal for different ones."""


class Transcript:
    """The events of one stream so far.

    Several choices go round by round: token i of each that has not ended, then token i + 1. So the order of events
    does not depend on which choice was faster, and costs at most the wait for the slowest.
    """

    def __init__(
        self, request: ResolvedRequest, tokenizer: ChatTokenizer, new_writer: Callable[[], EventWriter]
    ) -> None:
        """Raises `PromptError` for stop strings that can't be used."""
        self._request = request
        self._tokenizer = tokenizer
        self._new_writer = new_writer
        self._writer = new_writer()
        self._completion = Completion(request, tokenizer)
        self._outputs = [OutputTokens(each) for each in request.requests]
        """All tokens that have come; `_completion` has those whose turn it was."""
        self._told = [0] * request.choices
        """For each choice: the number of tokens that are in events."""
        self._failure: Failure | None = None
        self._turn = 0
        self._digest = 0
        """See `Event.digest`. A CRC is enough, since nobody gains by two texts with the same digest."""
        self.tokens = 0
        """Number of tokens that have come, over all choices."""

    @property
    def finished(self) -> bool:
        """Nothing more can come."""
        return self._failure is not None or self._completion.finished

    @property
    def outcome(self) -> str:
        """For the log: the finish reason or error code that came last."""
        return self._completion.outcome if self._failure is None else self._failure.code

    @property
    def cached_prompt_tokens(self) -> int:
        """For the log: prompt tokens that the replicas found in their caches."""
        counted = self._outputs[:: self._request.choices_per_prompt]
        return sum(output.stats.cached_prompt_tokens for output in counted if output.stats is not None)

    def opening(self) -> list[Event]:
        """The events before the first token."""
        return self._marked(self._writer.opened())

    def push(self, choice: int, batch: TokenBatch) -> list[Event]:
        """The events that `batch` adds; tokens that are known are dropped.

        Raises `BatchError` for a gap, and `OtherTokens` if tokens at known positions differ.
        """
        if self.finished or self._completion.ended(choice):
            return []
        self.tokens += self._outputs[choice].append(batch)
        return self._advance()

    def fail(self, failure: Failure) -> list[Event]:
        """End the stream with an error: the events of the error."""
        self._failure = failure
        self._roll(b"failed")
        return self._marked([self._writer.failed(RequestError.of(failure))])

    def again(self) -> Iterator[Event]:
        """All events from the first on, made again while the caller iterates; also those that come meanwhile."""
        other = Transcript(self._request, self._tokenizer, self._new_writer)
        yield from other.opening()
        more = True
        while more:
            more = False
            for choice, (output, known) in enumerate(zip(self._outputs, other._outputs, strict=True)):
                if known.finish_reason is not None or other._completion.ended(choice):
                    continue
                if (batch := _turn(output, len(known))) is not None:
                    more = True
                    yield from other.push(choice, batch)
        if self._failure is not None:
            yield from other.fail(self._failure)

    def ended(self, choice: int) -> bool:
        """Whether all events of this choice are there."""
        return self._completion.ended(choice)

    def output(self, choice: int) -> TokenBatch:
        """All tokens of this choice so far, and the counters that came with its first ones."""
        output = self._outputs[choice]
        return replace(output.tokens(0), stats=output.stats)

    def whole(self) -> tuple[list[TokenBatch], Failure | None]:
        """The output of each choice so far, with its end if it has ended; and the failure that ended the stream."""
        outputs = [
            replace(self.output(choice), finish_reason=output.finish_reason)
            for choice, output in enumerate(self._outputs)
        ]
        return outputs, self._failure

    def _advance(self) -> list[Event]:
        """The events of all turns that can be taken now."""
        events: list[Event] = []
        while not self._completion.finished and (delta := self._next_delta(self._turn)) is not None:
            events += self._marked(self._writer.gained(delta))
            if self._completion.finished:
                events += self._marked(self._writer.ended(self._completion.usage))
            else:
                self._pass_on()
        return events

    def _pass_on(self) -> None:
        """The next choice that has not ended has its turn."""
        self._turn = (self._turn + 1) % self._request.choices
        while self._completion.ended(self._turn):
            self._turn = (self._turn + 1) % self._request.choices

    def _next_delta(self, choice: int) -> Delta | None:
        """The delta of the choice's next token, or of its end; None when neither has come yet."""
        batch = _turn(self._outputs[choice], self._told[choice])
        if batch is None:
            return None
        if batch.token_ids:
            self._told[choice] += 1
            self._roll(b"%d %d" % (choice, batch.token_ids[0]))
        elif batch.finish_reason is not None:
            self._roll(b"%d %b" % (choice, batch.finish_reason.encode()))
        return self._completion.push(choice, batch)

    def _roll(self, told: bytes) -> None:
        self._digest = crc32(told, self._digest)

    def _marked(self, events: Iterable[bytes]) -> list[Event]:
        return [Event(content, self._digest) for content in events]


def logprob_entries(batch: TokenBatch) -> int:
    """How many entries there are to read or write in `batch`: its tokens, and the alternatives listed with each."""
    listed = 0 if not batch.logprobs else len(batch.logprobs[0].top)
    return len(batch.token_ids) * (1 + listed)


def _turn(output: OutputTokens, told: int) -> TokenBatch | None:
    """The token after the first `told` ones, or the end if there is none; None when neither has come yet."""
    if told < len(output):
        return replace(output.tokens(told, told + 1), stats=output.stats)
    if output.finish_reason is None:
        return None
    return replace(output.tokens(told), finish_reason=output.finish_reason, stats=output.stats)
