"""What was there when a process began to serve is not looked at again."""

from __future__ import annotations

import gc

from serve_app.deployments.garbage import freeze


class Loaded:
    """Something that stays."""


def test_what_is_loaded_is_no_longer_looked_at_and_what_comes_later_is() -> None:
    stays, before = Loaded(), gc.get_freeze_count()
    try:
        freeze()
        assert gc.get_freeze_count() > before + 1000
        later = Loaded()
        watched = {id(each) for each in gc.get_objects()}
        assert id(stays) not in watched
        assert id(later) in watched
    finally:
        gc.unfreeze()
