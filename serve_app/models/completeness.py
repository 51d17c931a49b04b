"""Did a model get every weight from its checkpoint, and the checkpoint's every weight a place in the model?

From the report that transformers gives with `output_loading_info=True`: it fills what is missing with random numbers,
leaves out what it has no place for, and only logs both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from serve_app.models.errors import ModelError


def require_complete(where: str, model: Any, report: Mapping[str, Any]) -> None:
    """Raise `ModelError` unless each weight of the transformers `model` was read from the checkpoint `where`.

    Tied weights and buffers that a class computes are not in transformers' list of the missing. Whole modules that the
    checkpoint has and the model has not (heads for other tasks, extra layers that predict ahead) may be left out; a
    bias or scale of a layer that is computed may not.
    """
    if missing := sorted(report["missing_keys"]):
        raise ModelError(f"{where} lacks weights of the model, e.g. {missing[0]}; fetch a whole checkpoint.")
    if mismatched := sorted(str(key) for key in report["mismatched_keys"]):
        raise ModelError(f"{where}: weights don't have the shape that config.json says, e.g. {mismatched[0]}.")
    layers = {name: module for name, module in model.named_modules() if module._parameters}
    buffers = {name for name, _ in model.named_buffers()}
    unread = sorted(key for key in report["unexpected_keys"] if key.rpartition(".")[0] in layers and key not in buffers)
    if unread:
        raise ModelError(
            f"{where} holds weights that config.json gives no place, e.g. {unread[0]}: without them it would be "
            "another model. Fetch the config.json that belongs to them."
        )
