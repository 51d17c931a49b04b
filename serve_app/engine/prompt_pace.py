"""How many tokens of prompts a step may compute where several tenants share an engine.

A request that comes waits until the running step has ended, and gets its first token at the end of one of the next. One
tenant that sends many prompts would fill all of them, up to `engine.max_step_tokens`. So prompts get as much of a step
as its decodes, or `LONGEST_S`, whichever is more. Pure: knows no clock.
"""

from __future__ import annotations

LONGEST_S = 0.05
"""What the prompts may add to a step, in seconds, whatever its decodes take: less would be noticed by nobody."""
LEAST_TOKENS = 32
"""Fewer tokens take hardly less time. Steps with fewer tokens of prompts tell nothing about what a token takes."""
_NEWEST_SHARE = 1 / 8
"""Weight of the newest step in the average."""


class PromptPace:
    """What the tokens of one engine's steps have taken."""

    def __init__(self) -> None:
        self._s_per_token: float | None = None

    def took(self, seconds: float, tokens: int, decodes: int) -> None:
        """A step has taken so long, with so many tokens, `decodes` of which were those of requests that decode."""
        if tokens - decodes >= LEAST_TOKENS:
            newest, before = seconds / tokens, self._s_per_token
            self._s_per_token = newest if before is None else before + (newest - before) * _NEWEST_SHARE

    def most(self, decodes: int) -> int | None:
        """How many tokens of prompts may stand beside so many decodes; None until it is known what they take."""
        if self._s_per_token is None:
            return None
        return max(LEAST_TOKENS, decodes, int(LONGEST_S / max(self._s_per_token, 1e-9)))
