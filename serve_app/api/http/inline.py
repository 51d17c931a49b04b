"""Where the work on a request runs: in the event loop while it is short, else in a thread.

The loop has every stream of this process to move. What decides is the size of the whole request, which is known before
anybody has looked into it. A thread helps with work that lets go of the interpreter: Python code, and the tokenizer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

INLINE_BYTES = 20_000
"""Of a request that is worked on in the loop: to encode so much text takes about 10 ms, all else less."""
ITEM_BYTES = 50
"""What an item of a list costs besides its text, as bytes of text: a message, which goes through the template."""
INLINE_ENTRIES = 2_000
"""Entries of the largest answer that is written in the loop: tokens, and the alternatives listed with them. Writing
2,000 takes about 10 ms."""

Result = TypeVar("Result")


async def run(work: Callable[[], Result], size_bytes: int, *, items: int = 0) -> Result:
    """What `work` makes of a request of so many bytes, and so many items in its longest list."""
    if size_bytes + ITEM_BYTES * items <= INLINE_BYTES:
        return work()
    return await asyncio.to_thread(work)
