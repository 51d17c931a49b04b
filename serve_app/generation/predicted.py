"""How much of a caller's prediction came true: a function of the prediction and of the output.

So it is the same through failovers and at every ingress, whatever was drafted. Pure.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

MAX_PREDICTED_TOKENS = 16_384
"""A longer prediction is cut to it: as many ids as an engine indexes for guesses. The index of so many ids here takes
10 ms of the event loop, once a request, and only if an answer leaves its prediction (AVX2)."""


class Prediction:
    """What a caller expects of each answer to a request; all its choices share one."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        self.token_ids = token_ids

    @cached_property
    def places(self) -> Mapping[tuple[int, int], Sequence[int]]:
        """Pairs of neighbours -> the indices after them, rising."""
        places: dict[tuple[int, int], list[int]] = {}
        for index, pair in enumerate(zip(self.token_ids, self.token_ids[1:], strict=False), start=2):
            places.setdefault(pair, []).append(index)
        return places


class PredictionCount:
    """Counts the tokens of one output that the prediction has too, in the prediction's order.

    An output that has left the prediction returns to it where two of its tokens in a row are there again, further on.
    """

    def __init__(self, prediction: Prediction) -> None:
        self._prediction = prediction
        self._next = 0
        """Index of the first id that can still be met."""
        self._follows = True
        """Whether the output's last token was one of the prediction; also at its beginning."""
        self._last = -1
        self.accepted = 0

    @property
    def rejected(self) -> int:
        """Tokens of the prediction that the output does not have."""
        return len(self._prediction.token_ids) - self.accepted

    def push(self, token_ids: Iterable[int]) -> None:
        """The next tokens of the output."""
        predicted = self._prediction.token_ids
        for token_id in token_ids:
            if self._follows and self._next < len(predicted) and predicted[self._next] == token_id:
                self._next += 1
                self.accepted += 1
            else:
                self._return(token_id)
            self._last = token_id

    def _return(self, token_id: int) -> None:
        """Find the output's last two tokens further on in the prediction."""
        followed, self._follows = self._follows, False
        if self._next >= len(self._prediction.token_ids):
            return
        new = 1 if followed else 2  # tokens that are not counted yet
        places = self._prediction.places.get((self._last, token_id), ())
        found = bisect_left(places, self._next + new)
        if found < len(places):
            self._next, self._follows = places[found], True
            self.accepted += new
