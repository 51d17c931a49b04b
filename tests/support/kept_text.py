"""How much text an object keeps: what a reader that looks at all of it again and again must pay for."""

from __future__ import annotations

import gc
from types import CodeType, FunctionType, ModuleType

_SHARED = (ModuleType, FunctionType, CodeType, type)


def kept_characters(kept: object) -> int:
    """The characters of all texts that can be reached from an object, without those of modules, classes and code."""
    found: dict[int, object] = {}
    pending = [kept]
    while pending:
        item = pending.pop()
        shared = isinstance(item, _SHARED) or (isinstance(item, dict) and "__builtins__" in item)
        if id(item) not in found and not shared:
            found[id(item)] = item
            pending += gc.get_referents(item)
    return sum(len(item) for item in found.values() if isinstance(item, str))
