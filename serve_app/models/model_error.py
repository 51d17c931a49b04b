"""The one exception of this room: a person has to correct something about the model.

Promises a single clear sentence on what to do. Whoever shows it needs no traceback.
"""

from __future__ import annotations


class ModelError(Exception):
    """The model can't be fetched, converted, loaded or served. `str(error)` says what is wrong and what to do.

    Trying again doesn't help, so a deployment reports it at once.
    """
