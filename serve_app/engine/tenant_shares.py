"""Which sequences stand back for those of a tenant that has less than its share of an engine.

A tenant's share is one of the places, by its weight (`serve_app.fair_queue.may_take_from`). Pure functions of what runs
and what waits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from collections.abc import Sequence as SequenceOf

from serve_app.engine.sequence import Sequence
from serve_app.engine.waiting_line import by_order
from serve_app.fair_queue import may_take_from

YIELD_TOKENS = 16
"""A sequence that has yielded yields again only after so many more tokens. So an output of n tokens yields n / 16 + 1
times at most, and an interactive request waits for batch for at most 16 steps and the prefill of a batch sequence."""


def interactive_of_tenants(running: Iterable[Sequence]) -> Counter[str]:
    """How many interactive sequences of each tenant run."""
    return Counter(s.request.tenant for s in running if not s.batch)


def yielding_to(newcomer: Sequence, running: SequenceOf[Sequence]) -> list[Sequence]:
    """The running sequences that yield their places to an interactive one.

    They are all of batch, and of each tenant with more than its share as many as it has too much beside the newcomer's
    tenant, the last ones.
    """
    tenant, weight = newcomer.request.tenant, newcomer.request.weight
    count = interactive_of_tenants(running)
    if count.total() == count[tenant] == len(running):
        return []  # they are all its own, and none is batch
    able = sorted((s for s in running if s.output_len >= s.yields_from and not s.isolated), key=by_order)
    yielding = [s for s in able if s.batch]
    for s in reversed(able):
        other = s.request
        if s.batch or other.tenant == tenant:
            continue
        if may_take_from(count[tenant], weight, count[other.tenant], other.weight):
            yielding.append(s)
            count[other.tenant] -= 1
    return yielding


def pausing_tenants(running: SequenceOf[Sequence], newcomers: Iterable[Sequence]) -> frozenset[str]:
    """The tenants without which the next step should be: they have more than their share beside one whose request has
    no token yet.

    `newcomers`: the first ones that wait of each tenant.
    """
    count = interactive_of_tenants(running)
    weights = {s.request.tenant: s.request.weight for s in running if not s.batch}
    begun = sorted((s for s in running if s.output_len == 0 and s.remaining > 1), key=by_order)
    for sequence in (*begun, *newcomers):
        if sequence.batch or sequence.isolated:
            continue
        tenant, weight = sequence.request.tenant, sequence.request.weight
        taken = count[tenant] - (sequence in begun)
        others = (other for other in count if other != tenant)
        pausing = frozenset(o for o in others if may_take_from(taken, weight, count[o], weights[o]))
        if pausing:
            return pausing
    return frozenset()


def takes_part(sequence: Sequence, pausing: Collection[str]) -> bool:
    """Whether the sequence may be in a step without these tenants. If there are any, batch pauses too."""
    return not pausing or not (sequence.batch or sequence.request.tenant in pausing)
