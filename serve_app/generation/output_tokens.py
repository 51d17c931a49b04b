"""What was generated so far of one choice: token ids, logprobs where they were asked for, and how it ended.

Promises that ids are consecutive, that each position is written once, even if attempts send tokens twice, and that no
token is there before the prompt's logprobs are, where they were asked for.
Knows no replica, no text and no clock.
"""

from __future__ import annotations

from serve_app.core import (
    FinishReason,
    GenerationRequest,
    GenerationStats,
    PromptLogprobs,
    TokenBatch,
    TokenLogprobs,
)


class BatchError(Exception):
    """A batch that can't follow what is there: ids are missing, there are too many, or their logprobs are missing."""


class OtherTokens(BatchError):
    """A batch whose tokens differ from those received before at the same positions: it belongs to another text."""


class OutputTokens:
    """The output of one choice, in order. With the request it is the whole state of a generation."""

    __slots__ = ("_request", "_with_logprobs", "finish_reason", "logprobs", "prompt_logprobs", "stats", "token_ids")

    def __init__(self, request: GenerationRequest) -> None:
        self._request = request
        self._with_logprobs = request.sampling.logprobs is not None
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        """One per token when they were asked for, else empty."""
        self.prompt_logprobs: PromptLogprobs | None = None
        """Those of the first attempt that delivered them, if they were asked for."""
        self.finish_reason: FinishReason | None = None
        self.stats: GenerationStats | None = None
        """Counters of the first attempt that delivered tokens. Cache hits of later attempts save the caller nothing."""

    def __len__(self) -> int:
        return len(self.token_ids)

    def append(self, batch: TokenBatch) -> int:
        """Add the tokens of `batch` that are new, and return their number. Those received before are dropped.

        Raises `BatchError` or `OtherTokens`, and adds nothing then.
        """
        first = batch.first_index
        known = len(self.token_ids) - first
        if known < 0:
            raise BatchError(f"tokens {len(self.token_ids)} to {first - 1} are missing")
        if known and batch.token_ids[:known] != tuple(self.token_ids[first : first + len(batch.token_ids)]):
            raise OtherTokens(f"the tokens from position {first} differ from those that were received before")
        new_ids = batch.token_ids[known:]
        of_prompt = self.prompt_logprobs
        if self._request.prompt_logprobs is not None and of_prompt is None:
            of_prompt = batch.prompt_logprobs
            if of_prompt is None and (new_ids or batch.finish_reason is not None):
                raise BatchError("tokens came without the prompt's logprobs")
            if of_prompt is not None and len(of_prompt) != len(self._request.prompt_token_ids) - 1:
                raise BatchError("the prompt's logprobs are those of another prompt")
        if new_ids:
            limit = self._request.max_new_tokens
            if len(self.token_ids) + len(new_ids) > limit:
                raise BatchError(f"the batch exceeds the limit of {limit} tokens")
            if self._with_logprobs:
                if batch.logprobs is None or len(batch.logprobs) != len(batch.token_ids):
                    raise BatchError("tokens came without their logprobs")
                self.logprobs.extend(batch.logprobs[known:])
            self.token_ids.extend(new_ids)
        self.prompt_logprobs = of_prompt
        if self.stats is None:
            self.stats = batch.stats
        if batch.finish_reason is not None:
            self.finish_reason = batch.finish_reason
        return len(new_ids)

    def tokens(self, first: int, end: int | None = None) -> TokenBatch:
        """The tokens from position `first` to `end` (None: to the last), with logprobs, without stats or an end.

        The prompt's logprobs come with position 0.
        """
        logprobs = tuple(self.logprobs[first:end]) if self._with_logprobs else None
        of_prompt = self.prompt_logprobs if first == 0 else None
        return TokenBatch(first, tuple(self.token_ids[first:end]), logprobs, prompt_logprobs=of_prompt)

    def complete(self) -> bool:
        """Whether the output is complete, even if the batch with its `finish_reason` was lost; sets that if so.

        Whether a grammar ends an output only a replica can tell: it may be complete although this says no, and at the
        limit it may have stopped there.
        """
        if self._request.prompt_logprobs is not None and self.prompt_logprobs is None:
            return False
        if self.finish_reason is None:
            last = self.token_ids[-1] if self.token_ids else None
            reason = self._request.finish_reason(len(self.token_ids), last)
            if not (self._request.constraint and reason is FinishReason.LENGTH):
                self.finish_reason = reason
        return self.finish_reason is not None
