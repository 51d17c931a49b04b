"""How many random cases a test tries: few in each run, many where somebody looks for new ones."""

from __future__ import annotations

from hypothesis import settings


def cases(usually: int, exploring: int) -> int:
    """`exploring` of them with `--hypothesis-profile=explore`."""
    return exploring if settings.get_current_profile_name() == "explore" else usually
