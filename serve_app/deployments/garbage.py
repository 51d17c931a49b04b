"""Python's garbage collector in a process that serves streams."""

from __future__ import annotations

import gc


def freeze() -> None:
    """Collect now, and never look again at what is left.

    To be called once, when all that stays is loaded. A full collection looks at every object while nothing else runs
    in the process: 285,000 objects of an ingress with its tokenizer took 260 to 410 ms, in which no stream moved.
    """
    gc.collect()
    gc.freeze()
