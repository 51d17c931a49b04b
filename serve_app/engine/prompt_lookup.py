"""Prompt lookup: speculative decoding that drafts from a sequence's own earlier ids, without a second model.

A caller's prediction of the output is looked up like the prompt. Guesses the next ids of a sequence, and decides how
many guesses are worth a row of a step. The engine verifies each guess exactly, so drafts never change a token, only the
step that gives it. Knows no device and no scheduling.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as SequenceOf

ROW_COST = 1 / 12
"""The time that one more row adds to a step, as a share of a step of one row; used where it was not measured (on a GPU
it is less). A guess with a smaller probability to be right is never made."""
CANDIDATES = 8
"""Earlier occurrences of the last two ids that are compared, the most recent first."""
MAX_INDEXED_PROMPT_TOKENS = 16_384
"""Of a longer prompt only its last ids are indexed. The index takes about 150 bytes an id."""
INDEXED_PER_STEP = 512
"""Ids that a step indexes, over all its sequences. 512 ids of prompts take 0.1 ms (8,000 took 1.7 ms), 512 ids of
outputs 1.5 ms; outputs fall behind only while no row is free for guesses."""
LONGEST_MATCH = 16
"""Matches of more ids predict the next id no better."""

_PRIOR = {2: 0.2, 3: 0.3, 4: 0.5, 8: 0.7, LONGEST_MATCH: 0.8}
"""Least length of a match -> estimated share of next ids that agree, used before a request has data of its own."""
_PRIOR_WEIGHT = 3.0
"""Observations that the prior counts as."""
_DECAY = 0.9
"""Weight of an observation relative to the one after it."""
_PREDICTED = 8
"""A prediction's first ids are guessed as if so many ids before them agreed."""
_BEFORE, _AFTER = 2**31, 2**31 + 1
"""Stand around a prediction, and are no ids."""
_CLASS = tuple(sum(least <= max(2, match) for least in _PRIOR) - 1 for match in range(LONGEST_MATCH + 1))
"""Length of a match -> its place in `_PRIOR`."""


class Lookup:
    """An index of one sequence's pairs of ids, and how well earlier occurrences have predicted its output.

    Every output id is compared with its prediction, whether it was drafted or not. So a request whose guesses fail
    costs one look-up a token and no rows, and guessing resumes when a request begins to repeat itself.
    """

    def __init__(self, token_ids: SequenceOf[int], predicted: SequenceOf[int] = (), prompt_len: int = 0) -> None:
        """`token_ids`: prompt and output so far. It may grow; nothing is read before `index`.

        `predicted`: what the caller expects of the output, which begins at `prompt_len`.
        """
        self._token_ids = token_ids
        self._ids = token_ids
        self._joined: list[int] | None = None
        """With a prediction: `_ids` as a list of its own, prompt, prediction and output."""
        self._start = 0
        """Index of the prediction's first id if the output begins after this; 0: there is none, or it does not."""
        if predicted:
            self._joined = [*token_ids[:prompt_len], _BEFORE, *predicted, _AFTER, *token_ids[prompt_len:]]
            self._ids = self._joined
            self._start = prompt_len + 1 if len(token_ids) == prompt_len else 0
        self._known = len(token_ids)
        self._given = len(self._ids)
        """Length of the prefix that is only indexed. The ids after it also update the estimates of `guess`."""
        self._indexed = max(0, self._given - MAX_INDEXED_PROMPT_TOKENS)
        self._latest: dict[int, int] = {}
        """A pair of ids, as one number -> the index after its latest occurrence."""
        self._earlier = array("q", bytes(8 * self._indexed))
        """For the pair that ends at each index: the index after its previous occurrence; 0: none."""
        self._place = 0
        """Index of the id that is predicted next; 0: there is no prediction."""
        self._match = 0
        """How many ids before `_place` equal the sequence's last ids, `LONGEST_MATCH` at most."""
        self._hits = [chance * _PRIOR_WEIGHT for chance in _PRIOR.values()]
        self._tries = [_PRIOR_WEIGHT] * len(_PRIOR)

    def index(self, most: int) -> int:
        """Index the next ids, `most` at most; returns how many.

        How the ids are divided into calls does not change the guesses that follow once all are indexed.
        """
        if self._joined is not None:
            added = self._given - self._known
            self._joined.extend(self._token_ids[len(self._joined) - added :])
        begin = self._indexed
        end = min(len(self._ids), begin + most)
        for _ in range(begin, min(end, self._given)):
            self._add_pair()
        if begin < self._indexed == self._given:
            self._find()
            if self._start:
                self._place, self._match = self._start, _PREDICTED
        for index in range(self._indexed, end):
            self._learn(index)
        return end - begin

    def _learn(self, index: int) -> None:
        place = self._place
        agrees = place > 0 and self._ids[place] == self._ids[index]
        if place:
            kind = _CLASS[self._match]
            self._hits[kind] = self._hits[kind] * _DECAY + agrees
            self._tries[kind] = self._tries[kind] * _DECAY + 1
        self._add_pair()
        if agrees and self._ids[place + 1] < _BEFORE:
            self._place, self._match = place + 1, min(self._match + 1, LONGEST_MATCH)
        else:
            self._find()

    def guess(self, count: int) -> list[tuple[int, float]]:
        """Up to `count` guesses of the next ids, each with its probability.

        The probability is an estimate that this guess and all before it are right. Guesses end where it falls to
        `ROW_COST`. There are none before all ids are indexed.
        """
        if not self._place or self._indexed < len(self._ids):
            return []
        ids = self._ids[self._place : self._place + count]
        period = self._indexed - self._place
        guesses: list[tuple[int, float]] = []
        chance = 1.0
        for place in range(count):
            kind = _CLASS[min(self._match + place, LONGEST_MATCH)]
            chance *= self._hits[kind] / self._tries[kind]
            if chance <= ROW_COST or ids[place % period] >= _BEFORE:
                break
            # Beyond the last known id the predicted stretch repeats.
            guesses.append((ids[place % period], chance))
        return guesses

    def _add_pair(self) -> None:
        ids, index = self._ids, self._indexed
        self._indexed += 1
        if index == 0:
            self._earlier.append(0)
            return
        pair = ids[index - 1] << 32 | ids[index]
        self._earlier.append(self._latest.get(pair, 0))
        self._latest[pair] = index + 1

    def _find(self) -> None:
        """Predict from the earlier place with the longest match before it; of equally long matches, from the latest."""
        self._place = self._match = 0
        ids, last = self._ids, self._indexed - 1
        place = self._earlier[last] if last > 0 else 0
        for _ in range(CANDIDATES):
            if not place:
                return
            match, most = 2, min(place, LONGEST_MATCH)
            while match < most and ids[place - 1 - match] == ids[last - match]:
                match += 1
            if match > self._match and ids[place] < _BEFORE:
                self._place, self._match = place, match
            place = self._earlier[place - 1]


def share_rows(
    guesses: SequenceOf[SequenceOf[tuple[int, float]]], rows: int, sampled: int, row_cost: float
) -> list[int]:
    """How many guesses of each sequence to verify, at most `rows` together, in a step that gives `sampled` tokens.

    A guess gets a row while that raises the expected tokens per second: while its probability to be right, divided by
    the cost of a row, is more than the step's expected tokens, divided by the step's cost.

    Args:
        guesses: those of each sequence (see `Lookup.guess`); their probabilities never rise.
        rows: free rows of the step.
        sampled: tokens that the step gives without guesses.
        row_cost: the time that one more row adds, as a share of a step of one row.
    """
    lengths = [0] * len(guesses)
    tokens, cost = float(sampled), 1 + row_cost * (sampled - 1)
    best = sorted(((chance, index) for index, of in enumerate(guesses) for _, chance in of), key=lambda c: -c[0])
    for chance, index in best[: max(0, rows)]:
        if chance * cost <= tokens * row_cost:
            break
        lengths[index] += 1
        tokens += chance
        cost += row_cost
    return lengths


def count_accepted(draft: SequenceOf[int], sampled: SequenceOf[int]) -> int:
    """How many ids of the draft equal the ids sampled in their places, up to the first that differs."""
    for place, guessed in enumerate(draft):
        if sampled[place] != guessed:
            return place
    return len(draft)
