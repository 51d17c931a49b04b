"""The ids of tool calls in an answer.

Promises the same id for the same call of the same answer, whichever ingress writes it. Knows no wire format.
"""

from __future__ import annotations

from hashlib import sha256


def call_id(answer_id: str, choice: int, index: int, prefix: str = "call_") -> str:
    """The id of call number `index` of a choice. `answer_id`: unique to the answer, and kept with it."""
    return prefix + sha256(f"{answer_id} {choice} {index}".encode()).hexdigest()[:24]
