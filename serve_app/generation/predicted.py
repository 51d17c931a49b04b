"""How much of a caller's prediction came true: a function of the prediction and of the output.

So it is the same through failovers and at every ingress, whatever was drafted. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class PredictionCount:
    """Counts the tokens of one output that the prediction has too, in the prediction's order.

    An output that has left the prediction returns to it where two of its tokens in a row are there again, further on.
    """

    def __init__(self, predicted: Sequence[int]) -> None:
        self._predicted = predicted
        self._places: dict[tuple[int, int], list[int]] = {}
        """Pairs of neighbours -> the indices after them, from the last to the first."""
        for index in range(len(predicted) - 1, 0, -1):
            self._places.setdefault((predicted[index - 1], predicted[index]), []).append(index + 1)
        self._next = 0
        """Index of the first id that can still be met."""
        self._follows = True
        """Whether the output's last token was one of the prediction; also at its beginning."""
        self._last = -1
        self.accepted = 0

    @property
    def rejected(self) -> int:
        """Tokens of the prediction that the output does not have."""
        return len(self._predicted) - self.accepted

    def push(self, token_ids: Iterable[int]) -> None:
        """The next tokens of the output."""
        for token_id in token_ids:
            if self._follows and self._next < len(self._predicted) and self._predicted[self._next] == token_id:
                self._next += 1
                self.accepted += 1
            else:
                self._return(token_id)
            self._last = token_id

    def _return(self, token_id: int) -> None:
        places = self._places.get((self._last, token_id), [])
        while places and places[-1] < self._next + (1 if self._follows else 2):
            places.pop()
        self._follows, followed = bool(places), self._follows
        if places:
            self._next = places.pop()
            self.accepted += 1 if followed else 2
