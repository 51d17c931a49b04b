"""Checks that a model got every weight from its checkpoint, and that it has a place for each of the checkpoint's.

Reads the report that transformers gives with `output_loading_info=True`: transformers fills missing weights with random
numbers, leaves out those that it has no place for, and only logs both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Any

from serve_app.models.model_error import ModelError

_NO_WEIGHTS = frozenset({"bias", "masked_bias", "inv_freq", "k_scale", "v_scale"})
"""Entries of an attention module itself, not of its linear layers, that some checkpoints hold and that have no effect
here: masks, rotary frequencies, and scales for an 8-bit KV cache."""


def require_complete(where: str, model: Any, report: Mapping[str, Any]) -> None:
    """Raise `ModelError` unless each weight of the transformers `model` was read from the checkpoint `where`.

    transformers does not list tied weights, or buffers that a class computes, as missing. Weights beside the model
    (heads for other tasks, extra layers that predict ahead) may stay unread. Weights within a computed layer, such as
    norms of queries or experts, may not, nor may one more layer like the last.
    """
    if missing := sorted(report["missing_keys"]):
        raise ModelError(f"{where} lacks weights of the model, e.g. {missing[0]}; fetch a whole checkpoint.")
    if mismatched := sorted(str(key) for key in report["mismatched_keys"]):
        raise ModelError(f"{where}: weights don't have the shape that config.json says, e.g. {mismatched[0]}.")
    if unread := sorted(_unread(model, report["unexpected_keys"])):
        raise ModelError(
            f"{where} holds weights that the model of config.json does not use, e.g. {unread[0]}. Without them its "
            "answers would be wrong; fetch the config.json that belongs to these weights."
        )


def _unread(model: Any, keys: Iterable[str]) -> Iterator[str]:
    """Those of `keys`, the names that the model has no place for, that belong to what it computes."""
    from torch.nn import ModuleList  # an ingress imports this file and has no torch

    keys = sorted(keys)
    computed = {name for name, module in model.named_modules() if module._parameters}
    lists = {name: len(module) for name, module in model.named_modules() if isinstance(module, ModuleList)}
    listed = {f"{name}.{number}" for name, count in lists.items() for number in range(count)}
    buffers = {name for name, _ in model.named_buffers()}
    parameters = {name for name, _ in model.named_parameters()}
    for key in keys:
        parent, _, last = key.rpartition(".")
        around = {*accumulate(parent.split("."), "{}.{}".format)}
        if key in buffers or around & parameters:  # entries below a parameter say how it is quantised
            continue
        if parent in computed or (around & listed and last not in _NO_WEIGHTS):
            yield key
    for name, count in lists.items():
        # A layer that predicts ahead has more entries: heads or norms that join it to the model.
        usual = _within(f"{name}.{count - 1}", parameters)
        if usual and _within(f"{name}.{count}", keys) == usual:
            yield f"{name}.{count}.{min(usual)}"


def _within(module: str, names: Iterable[str]) -> set[str]:
    """Those of `names` that are below `module`, without its prefix."""
    return {name.removeprefix(f"{module}.") for name in names if name.startswith(f"{module}.")}
