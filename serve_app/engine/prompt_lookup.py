"""Speculative decoding without a second model: what a request has said before, it may be saying again.

Guesses next ids from earlier places in a sequence's own ids, and decides how many guesses are worth a row of a step.
They are verified exactly, so nothing here changes a token, only when it comes. Knows no device and no scheduling.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as SequenceOf

ROW_COST = 1 / 12
"""What one more row adds to a step, as a share of a step of one row, where it was not measured (on a GPU it is less). A
guess with a smaller chance to be right is never made."""
CANDIDATES = 8
"""Earlier places of the last two ids that are compared, the most recent first."""
REACH = 16_384
"""Ids before the first output that are looked at, the last ones of the prompt: the index takes some 150 bytes each."""
READ_AT_ONCE = 512
"""Ids that a step reads for all its sequences together: 0.1 ms of a prompt's (8,000 at once took 1.7 ms), 1.5 ms of
output's, which are behind only while no row is free."""
LONGEST_MATCH = 16
"""More ids that agree say no more about the next one."""

_PRIOR = {2: 0.2, 3: 0.3, 4: 0.5, 8: 0.7, LONGEST_MATCH: 0.8}
"""How often the next id agrees after a match of at least so many ids, until a request has shown its own habit."""
_PRIOR_WEIGHT = 3.0
_MEMORY = 0.9
"""What an observation counts beside the one after it."""
_CLASS = tuple(sum(least <= max(2, match) for least in _PRIOR) - 1 for match in range(LONGEST_MATCH + 1))


class Lookup:
    """Where one sequence's ids occurred before, and how well that has foretold its output.

    Every output id is compared with what was foretold, whether it was drafted or not. So a request whose guesses fail
    costs a look-up a token and no arithmetic, and one that begins to repeat itself is noticed.
    """

    def __init__(self, token_ids: SequenceOf[int]) -> None:
        """`token_ids`: prompt and output so far. It may grow; nothing is read before `follow`."""
        self._ids = token_ids
        self._given = len(token_ids)
        """So many are only remembered. Of those after them it learns how well it foretells."""
        self._known = max(0, len(token_ids) - REACH)
        self._latest: dict[int, int] = {}
        """Two ids, as one number -> the place after their latest occurrence."""
        self._earlier = array("q", bytes(8 * self._known))
        """For the two ids that end at each index, the place after their occurrence before that; 0: none."""
        self._place = 0
        """Where it goes on as before: the index of the next guess; 0: nowhere."""
        self._match = 0
        """How many ids before it are the last ones; `LONGEST_MATCH` for more."""
        self._hits = [chance * _PRIOR_WEIGHT for chance in _PRIOR.values()]
        self._tries = [_PRIOR_WEIGHT] * len(_PRIOR)

    def follow(self, most: int | None = None) -> int:
        """Read the ids that it doesn't know yet, in order, at most `most` of them; how many it read.

        However they are divided over calls, the guesses are the same once all are known.
        """
        begin = self._known
        end = len(self._ids) if most is None else min(len(self._ids), begin + most)
        for _ in range(begin, min(end, self._given)):
            self._index()
        if begin < self._known == self._given:
            self._find()
        for index in range(self._known, end):
            self._learn(index)
        return end - begin

    def _learn(self, index: int) -> None:
        place = self._place
        agrees = place > 0 and self._ids[place] == self._ids[index]
        if place:
            kind = _CLASS[self._match]
            self._hits[kind] = self._hits[kind] * _MEMORY + agrees
            self._tries[kind] = self._tries[kind] * _MEMORY + 1
        self._index()
        if agrees:
            self._place, self._match = place + 1, min(self._match + 1, LONGEST_MATCH)
        else:
            self._find()

    def guess(self, count: int) -> list[tuple[int, float]]:
        """Up to `count` next ids, if it goes on as it did before, each with its chance.

        The chance is the estimated probability that this guess and all before it are right. Guesses end where it is
        too small for a row in any step. There are none before all ids are read.
        """
        if not self._place or self._known < len(self._ids):
            return []
        ids = self._ids[self._place : self._place + count]
        period = self._known - self._place
        guesses: list[tuple[int, float]] = []
        chance = 1.0
        for place in range(count):
            kind = _CLASS[min(self._match + place, LONGEST_MATCH)]
            chance *= self._hits[kind] / self._tries[kind]
            if chance <= ROW_COST:
                break
            # Where its past ends it begins again.
            guesses.append((ids[place % period], chance))
        return guesses

    def _index(self) -> None:
        ids, index = self._ids, self._known
        self._known += 1
        if index == 0:
            self._earlier.append(0)
            return
        pair = ids[index - 1] << 32 | ids[index]
        self._earlier.append(self._latest.get(pair, 0))
        self._latest[pair] = index + 1

    def _find(self) -> None:
        """The place whose preceding ids agree longest with the last ones; of equals the latest."""
        self._place = self._match = 0
        ids, last = self._ids, self._known - 1
        place = self._earlier[last] if last > 0 else 0
        for _ in range(CANDIDATES):
            if not place:
                return
            match, most = 2, min(place, LONGEST_MATCH)
            while match < most and ids[place - 1 - match] == ids[last - match]:
                match += 1
            if match > self._match:
                self._place, self._match = place, match
            place = self._earlier[place - 1]


def share_rows(
    guesses: SequenceOf[SequenceOf[tuple[int, float]]], rows: int, sampled: int, row_cost: float = ROW_COST
) -> list[int]:
    """How many guesses of each sequence to verify, at most `rows` together, in a step that gives `sampled` tokens.

    A guess gets a row while that raises the tokens expected per time: while its chance to be right, over what a row
    costs, is more than the tokens that the step is expected to give, over what the step costs.

    Args:
        guesses: of each sequence (see `Lookup.guess`); their chances never rise.
        rows: free ones.
        sampled: tokens that the step gives without guesses.
        row_cost: of a step of one row.
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


def agreed(draft: SequenceOf[int], sampled: SequenceOf[int]) -> int:
    """How many guesses are the ids that were sampled in their places, up to the first that isn't."""
    for place, guessed in enumerate(draft):
        if sampled[place] != guessed:
            return place
    return len(draft)
