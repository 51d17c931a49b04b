"""The one way a command fails: a sentence for the terminal and an exit status.

Whoever raises it has said what is wrong and what to do; no traceback follows.
"""

from __future__ import annotations


class CommandError(Exception):
    """Ends the command. Status 1: it could not be done; 2: what was typed or configured is wrong."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status
