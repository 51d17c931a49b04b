"""The one exception of this room: something about the weights that a person has to put right.

Promises a single clear sentence on what to do. Whoever shows it needs no traceback.
"""

from __future__ import annotations


class ModelError(Exception):
    """The model can't be fetched, converted, loaded or served. `str(error)` says what is wrong and what to do.

    It won't heal by trying again: a deployment that meets it says so at once.
    """
