"""One choice on its way from ids to text: detokenised, cut at stop strings, counted.

Promises that the pieces of text concatenated are the answer, and that a batch costs no more than its tokens. Pure: no
I/O, no wire format.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from serve_app.chat.detokenizer import Detokenizer
from serve_app.chat.stop_strings import StopStrings
from serve_app.messages import FinishReason, TokenBatch, TokenLogprobs


class Delta(NamedTuple):
    """What a choice has gained. The first of a stream may be empty: the request was accepted."""

    choice: int
    token_ids: tuple[int, ...]
    texts: tuple[str, ...]
    """The text that each token made certain, often "" (an incomplete character, a stop string that may be coming, EOS).
    One entry more than tokens when text became certain without one."""
    logprobs: tuple[TokenLogprobs, ...] | None
    finish_reason: FinishReason | None


class ChoiceText:
    """The state of one choice's text."""

    def __init__(
        self, choice: int, detokenizer: Detokenizer, stops: Sequence[str], stop_token_ids: frozenset[int]
    ) -> None:
        """`stop_token_ids` are counted and have no text. Raises `PromptError` for a stop string that can't be used."""
        self._choice = choice
        self._detokenizer = detokenizer
        self._stops = StopStrings(stops)
        self._stop_token_ids = stop_token_ids
        self.tokens = 0
        """Counted for the caller: all up to the end, EOS included."""

    def push(self, batch: TokenBatch) -> Delta:
        """The text of `batch`. With a `finish_reason` in the result the choice has ended: push no more.

        A stop string ends it before the model does; what the batch holds beyond is dropped.
        """
        texts: list[str] = []
        for token_id in batch.token_ids:
            text = "" if token_id in self._stop_token_ids else self._detokenizer.push(token_id)
            text, stopped = self._stops.push(text)
            texts.append(text)
            if stopped:
                return self._delta(batch, texts, FinishReason.STOP)
        if batch.finish_reason is None:
            return self._delta(batch, texts, None)
        return self._finish(batch, texts, batch.finish_reason)

    def _finish(self, batch: TokenBatch, texts: list[str], reason: FinishReason) -> Delta:
        text, stopped = self._stops.push(self._detokenizer.flush())
        if stopped:
            reason = FinishReason.STOP
        else:
            text += self._stops.flush()
        if texts:
            texts[-1] += text
        elif text:
            texts.append(text)
        return self._delta(batch, texts, reason)

    def _delta(self, batch: TokenBatch, texts: list[str], reason: FinishReason | None) -> Delta:
        token_ids = batch.token_ids[: len(texts)]
        logprobs = None if batch.logprobs is None else batch.logprobs[: len(texts)]
        self.tokens += len(token_ids)
        return Delta(self._choice, token_ids, tuple(texts), logprobs, reason)
