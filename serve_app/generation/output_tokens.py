"""What was delivered so far of one choice: token ids, and logprobs where they were asked for.

Promises that ids are consecutive and that each position is written once, whatever the attempts send twice.
Knows no replica, no text and no clock.
"""

from __future__ import annotations

from serve_app.core import TokenBatch, TokenLogprobs


class JournalError(Exception):
    """A batch that can't follow what is there: ids are missing, there are too many, or their logprobs are missing."""


class OtherTokens(JournalError):
    """A batch that repeats positions with other tokens than are there: it is of another text."""


class Journal:
    """The output of one choice, in order. With the request it is the whole state of a stream."""

    __slots__ = ("_limit", "_with_logprobs", "logprobs", "token_ids")

    def __init__(self, limit: int, *, with_logprobs: bool = False) -> None:
        """`limit`: the most tokens that it may ever hold (the request's `max_new_tokens`)."""
        self._limit = limit
        self._with_logprobs = with_logprobs
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        """One per token when they were asked for, else empty."""

    def __len__(self) -> int:
        return len(self.token_ids)

    def append(self, batch: TokenBatch) -> None:
        """Add what is new in `batch`; what overlaps was delivered before and is dropped.

        Raises `JournalError` or `OtherTokens`, and then has added nothing.
        """
        first = batch.first_index
        known = len(self.token_ids) - first
        if known < 0:
            raise JournalError(f"tokens {len(self.token_ids)} to {first - 1} are missing")
        if known and batch.token_ids[:known] != tuple(self.token_ids[first : first + len(batch.token_ids)]):
            raise OtherTokens(f"tokens from {first} on are others than those that are known")
        new_ids = batch.token_ids[known:]
        if not new_ids:
            return
        if len(self.token_ids) + len(new_ids) > self._limit:
            raise JournalError(f"more than {self._limit} tokens")
        if self._with_logprobs:
            if batch.logprobs is None or len(batch.logprobs) != len(batch.token_ids):
                raise JournalError("tokens came without their logprobs")
            self.logprobs.extend(batch.logprobs[known:])
        self.token_ids.extend(new_ids)
