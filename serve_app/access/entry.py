"""One choice of a request as the line of those that wait knows it, from its arrival to its end."""

from __future__ import annotations

from dataclasses import dataclass

from serve_app.core import GenerationRequest, Priority


@dataclass(slots=True, eq=False)
class Group:
    """The choices of one caller's request."""

    entries: int = 0
    started: bool = False
    """One of them has had a place."""


@dataclass(slots=True, eq=False)
class Entry:
    """One attempt of one choice: it waits, or has a place at a replica."""

    request: GenerationRequest | None
    """None for a call that generates nothing."""
    group: Group
    came_at: float
    answer_tokens: int = 0
    """New tokens that are expected of it."""
    queued: bool = False
    """It waits in its tenant's order. One that waits and is not queued comes before all that are."""
    charged: bool = False
    """It has started in its tenant's order."""
    new_tokens: int | None = None
    """How many tokens it has made, once it has ended; None if it made none."""
    placed_at: float | None = None
    """None: it waits."""
    began_at: float | None = None
    """When its replica could start it. None: it waits, here or as a spare one in its replica."""
    full: bool = False
    """Hardly any other place was left when it got its own."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens to be computed before its first new one."""
        return 0 if self.request is None else len(self.request.prompt_token_ids) + len(self.request.output_token_ids)

    @property
    def tokens(self) -> int:
        """What it is expected to cost."""
        return self.prompt_tokens + self.answer_tokens

    @property
    def priority(self) -> Priority:
        """Its class."""
        return Priority.INTERACTIVE if self.request is None else self.request.priority

    @property
    def payer(self) -> tuple[str, float]:
        """Its tenant, and what that one's share is."""
        return ("", 1.0) if self.request is None else (self.request.tenant, self.request.weight)

    @property
    def begun(self) -> bool:
        """It continues an output, or its caller was told that it is accepted: it comes first and is not refused."""
        return self.request is None or self.request.accepted or bool(self.request.output_token_ids)
