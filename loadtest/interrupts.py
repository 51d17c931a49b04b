"""Servers that a load test starts and stops with SIGINT."""

from __future__ import annotations

import signal


def heed_ctrl_c() -> None:
    """As a `preexec_fn`: the child ends at SIGINT, also where a script started this program in the background.

    A shell without job control has such jobs ignore SIGINT, and their children inherit that.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
