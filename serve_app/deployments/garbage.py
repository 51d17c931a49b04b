"""Python's garbage collector in a process that serves streams."""

from __future__ import annotations

import gc


def freeze() -> None:
    """Collect now, and exclude the objects that are left from later collections.

    Call it once, when everything long-lived is loaded. A full collection visits every object and stops the process
    meanwhile: the 285,000 objects of an ingress with its tokenizer took 260 to 410 ms, in which no stream moved.
    """
    gc.collect()
    gc.freeze()
