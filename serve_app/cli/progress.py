"""Shows progress: one line that is rewritten on a terminal, a few plain lines elsewhere.

Writes to stderr, so that a command's output stays clean. Knows stages and fractions only.
"""

from __future__ import annotations

import sys
from typing import Self

from serve_app.core import LoadStage

_PLAIN_STEP = 0.25  # without a terminal: a new line for each quarter, not for each percent


class ProgressLine:
    """Shows one stage after another; leave the block to end the line."""

    def __init__(self) -> None:
        self._out = sys.stderr
        self._rewrites = self._out.isatty()
        self._stage = ""
        self._shown = -1.0
        self._width = 0

    def show(self, state: LoadStage) -> None:
        """Show the stage and how far it is."""
        stage, fraction = state.stage, state.fraction
        text = stage if fraction is None else f"{stage}: {min(max(fraction, 0.0), 1.0):.0%}"
        if self._rewrites:
            self._out.write("\r" + text.ljust(self._width))
            self._width = len(text)
        elif stage != self._stage or (fraction is not None and fraction >= self._shown + _PLAIN_STEP):
            self._out.write(text + "\n")
            self._shown = fraction or 0.0
        self._stage = stage
        self._out.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Take the line away, so that something else can be printed."""
        if self._rewrites and self._width:
            self._out.write("\r" + " " * self._width + "\r")
            self._out.flush()
