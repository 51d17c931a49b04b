"""One choice on its way from ids to text: detokenised, cut at stop strings, counted.

Promises that the pieces of text concatenated are the answer, that logprobs belong to text that was sent, and that the
cost is linear in the tokens. Pure: no I/O, no wire format.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from serve_app.chat.detokenizer import Detokenizer
from serve_app.chat.parts import AnswerParser, CallPart, Part, TextPart, joined
from serve_app.chat.stop_strings import StopStrings
from serve_app.core import FinishReason, PromptLogprobs, TokenBatch, TokenLogprobs


class TokenLogprob(NamedTuple):
    """A token of the answer with its logprobs."""

    token_id: int
    offset: int
    """Characters of the answer before the token's text."""
    logprobs: TokenLogprobs


class Delta(NamedTuple):
    """What is new in one choice. The first delta of a stream may be empty: it says that the request was accepted."""

    choice: int
    token_ids: tuple[int, ...]
    texts: tuple[str, ...]
    """The text that each token made certain, often "" (an incomplete character, a stop string that may be coming, EOS).
    One entry more than tokens when text became certain without one."""
    logprobs: tuple[TokenLogprob, ...] | None
    """Logprobs of the tokens whose last piece of text is in this delta; None when none were requested. They may come
    later than their token's id, and never come when a stop string cut the token's text."""
    finish_reason: FinishReason | None
    read: tuple[Part, ...] | None = None
    """The parts that became certain, if the answer's text is read as parts; None: it is text and nothing else."""
    stop: str | None = None
    """The stop string that ended the choice."""
    prompt_logprobs: PromptLogprobs | None = None
    """With the first tokens, if they were requested."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """What the choice gained, as parts, whether its text is read or not."""
        if self.read is not None:
            return self.read
        text = "".join(self.texts)
        return (TextPart(text),) if text else ()


class _HeldLogprobs:
    """Logprobs of tokens whose text is not out yet: it may be the beginning of a stop string."""

    def __init__(self) -> None:
        self._made_chars = self._out_chars = 0
        self._unfinished: list[TokenLogprob] = []
        """Tokens without text of their own so far: parts of a character, or special tokens. They join the next text."""
        self._held: deque[tuple[int, TokenLogprob]] = deque()
        """(characters of text that must be sent first, the logprob)."""

    def add(self, token_id: int, logprobs: TokenLogprobs) -> None:
        """Add a token. The text that it completes, if any, is passed to `made` next."""
        self._unfinished.append(TokenLogprob(token_id, self._made_chars, logprobs))

    def made(self, text: str, *, last: bool = False) -> None:
        """Note decoded text, before it is searched for stop strings; `last`: none will follow."""
        self._made_chars += len(text)
        if text or last:
            self._held.extend((self._made_chars, token) for token in self._unfinished)
            self._unfinished.clear()

    def out(self, text: str) -> None:
        """Note text that is shown: no stop string cuts it."""
        self._out_chars += len(text)

    def take(self) -> tuple[TokenLogprob, ...]:
        """The logprobs whose text is now shown; each is returned once."""
        told: list[TokenLogprob] = []
        while self._held and self._held[0][0] <= self._out_chars:
            told.append(self._held.popleft()[1])
        return tuple(told)


class ChoiceText:
    """The state of one choice's text."""

    def __init__(
        self,
        choice: int,
        detokenizer: Detokenizer,
        stops: Sequence[str],
        stop_token_ids: frozenset[int],
        min_tokens: int = 0,
        parser: AnswerParser | None = None,
        scores_end: bool = False,
    ) -> None:
        """`stop_token_ids` are counted and have no text, and no logprobs unless `scores_end`. `parser` reads the text,
        if it has parts.

        A stop string counts only if a token after the first `min_tokens` completes it.
        Raises `PromptError` for a stop string that can't be used.
        """
        self._choice = choice
        self._detokenizer = detokenizer
        self._stops = StopStrings(stops)
        self._stop_token_ids = stop_token_ids
        self._min_tokens = min_tokens
        self._parser = parser
        self._scores_end = scores_end
        self._logprobs = _HeldLogprobs()
        self.tokens = 0
        """Counted for the caller: all up to the end, EOS included."""
        self.reasoning_tokens = 0
        """Those of `tokens` that the model reasoned with, the marks around the reasoning included."""
        self._parts: list[Part] = []
        """Those that belong to no delta yet."""
        self._called = False
        """The answer has called a tool."""

    def push(self, batch: TokenBatch) -> Delta:
        """The text of `batch`. With a `finish_reason` in the result the choice has ended: push no more.

        A stop string ends the choice before the model does, and so does a call where the answer may have only one; the
        rest of the batch is dropped then.
        """
        texts: list[str] = []
        for index, token_id in enumerate(batch.token_ids):
            text = ""
            if token_id not in self._stop_token_ids:
                text = self._detokenizer.push(token_id)
            if batch.logprobs is not None and (self._scores_end or token_id not in self._stop_token_ids):
                self._logprobs.add(token_id, batch.logprobs[index])
            text, stopped = self._show(text, self.tokens + index + 1)
            texts.append(text)
            if self._read(text, of_token=True) or stopped:
                return self._delta(batch, texts, FinishReason.STOP)
        if batch.finish_reason is None:
            return self._delta(batch, texts, None)
        text, stopped = self._show(self._detokenizer.flush(), self.tokens + len(texts), last=True)
        self._read(text, of_token=False)
        if text:  # not joined to the last token's: its end may come with it or later, and events must be the same
            texts.append(text)
        return self._delta(batch, texts, FinishReason.STOP if stopped else batch.finish_reason)

    def _show(self, text: str, tokens: int, *, last: bool = False) -> tuple[str, bool]:
        """What can be shown once `text` is decoded (after `tokens` tokens), and whether a stop string ends it."""
        self._logprobs.made(text, last=last)
        shown, stopped = self._stops.push(text, may_stop=tokens > self._min_tokens)
        if last and not stopped:
            shown += self._stops.flush()
        self._logprobs.out(shown)
        return shown, stopped

    def _delta(self, batch: TokenBatch, texts: list[str], reason: FinishReason | None) -> Delta:
        token_ids = batch.token_ids[: len(texts)]
        self.tokens += len(token_ids)
        logprobs = self._logprobs.take()
        read = None
        if self._parser is not None:
            if reason is not None:
                self._parts += self._parser.flush()
            read = tuple(joined(self._parts))
            self._parts.clear()
            self._called = self._called or any(isinstance(part, CallPart) for part in read)
            if self._called and reason is FinishReason.STOP and self._stops.hit is None:
                reason = FinishReason.TOOL_CALLS
        return Delta(
            self._choice,
            token_ids,
            tuple(texts),
            None if batch.logprobs is None and not logprobs else logprobs,
            reason,
            read,
            self._stops.hit,
            batch.prompt_logprobs,
        )

    def _read(self, text: str, *, of_token: bool) -> bool:
        """Read more of the text, that of a token or what became certain without one. Whether the answer is complete."""
        parser = self._parser
        if parser is None:
            return False
        was_reasoning = parser.in_reasoning
        self._parts += parser.push(text)
        self.reasoning_tokens += of_token and (was_reasoning or parser.in_reasoning)
        return parser.ended
