"""The state of one completion: tokens in, text out, usage, and how it ended.

Promises the same text, usage and outcome for the same tokens, however they come: streamed or not, from one attempt or
several, live or read from a journal. Pure: no I/O, no wire format.
"""

from __future__ import annotations

from dataclasses import dataclass

from serve_app.chat.answers import new_parser
from serve_app.chat.detokenizer import new_detokenizer
from serve_app.chat.tokenizer import ChatTokenizer
from serve_app.core import GenerationStats, TokenBatch
from serve_app.generation.predicted import Prediction, PredictionCount
from serve_app.generation.request import ResolvedRequest
from serve_app.generation.text import ChoiceText, Delta


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request cost, in tokens."""

    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens that the first choice of each prompt found in a replica's cache."""
    completion_tokens: int
    reasoning_tokens: int = 0
    """Those of `completion_tokens` that the model reasoned with."""
    accepted_prediction_tokens: int | None = None
    """Tokens of the caller's prediction that the answers have; None: there was no prediction."""
    rejected_prediction_tokens: int | None = None
    """Those that they don't have."""


class Completion:
    """The choices of one request, from the first token to the end of the last."""

    def __init__(self, request: ResolvedRequest, tokenizer: ChatTokenizer) -> None:
        """Raises `PromptError` for stop strings that can't be used."""
        self.request = request
        self._texts = [
            ChoiceText(
                each.choice,
                new_detokenizer(
                    tokenizer,
                    each.prompt_token_ids if request.continues else (),
                    () if request.answer is None else request.answer.shown_tokens,
                ),
                request.stops,
                request.stop_token_ids,
                each.sampling.min_tokens,
                None if request.answer is None else new_parser(request.answer),
                request.echo,
            )
            for each in request.requests
        ]
        predicted = request.requests[0].predicted_token_ids
        prediction = Prediction(predicted)
        self._predictions = [PredictionCount(prediction) for _ in request.requests if predicted]
        """One for each choice, or none."""
        self._stats: list[GenerationStats | None] = [None] * request.choices
        """For each choice, the stats of the attempt that began it."""
        self._ended = [False] * request.choices
        self.outcome = ""
        """The finish reason that came last."""

    def push(self, choice: int, batch: TokenBatch) -> Delta:
        """The delta of a choice from its next `batch`. Only for a choice that has not ended."""
        if self._stats[choice] is None:
            self._stats[choice] = batch.stats
        delta = self._texts[choice].push(batch)
        if self._predictions:
            self._predictions[choice].push(delta.token_ids)
        if delta.finish_reason is not None:
            self._ended[choice] = True
            self.outcome = delta.finish_reason
        return delta

    def ended(self, choice: int) -> bool:
        """Whether this choice has ended: by the model, at its limit or at a stop string."""
        return self._ended[choice]

    @property
    def finished(self) -> bool:
        """All choices have ended."""
        return all(self._ended)

    @property
    def usage(self) -> Usage:
        """What was counted so far."""
        counted = self._stats[:: self.request.choices_per_prompt]
        cached = sum(stats.cached_prompt_tokens for stats in counted if stats is not None)
        tokens = sum(text.tokens for text in self._texts)
        reasoning = sum(text.reasoning_tokens for text in self._texts)
        if not self._predictions:
            return Usage(self.request.prompt_tokens, cached, tokens, reasoning)
        accepted = sum(prediction.accepted for prediction in self._predictions)
        rejected = sum(prediction.rejected for prediction in self._predictions)
        return Usage(self.request.prompt_tokens, cached, tokens, reasoning, accepted, rejected)
