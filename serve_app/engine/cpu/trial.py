"""Calls every kernel of a library once, as a process of its own: `python -m serve_app.engine.cpu.trial DESCRIPTOR`.

An instruction that this processor lacks ends the process with SIGILL. The results are not checked here.
"""

from __future__ import annotations

import ctypes
import resource
import sys
from typing import Any

from serve_app.engine.cpu.library import Kernels, LayerPlan, LinearPart, NormPlan, StepPlan

FORMS = 7
"""How many forms of weights there are: `Form` of `kernels/weights.h`."""
TOKENS, HEADS, DIM = 13, 2, 16
"""`TOKENS` is more than the rows that a product computes at once (`MR` of `kernels/linear.cpp`)."""
HIDDEN = HEADS * DIM


def call_all(kernels: Kernels) -> None:
    """Compute two decoder layers with weights in each form, and mask and sample once."""
    for form in range(FORMS):
        for activation in (0, 1):
            _compute_layers(kernels, form, activation)
    choices = (ctypes.c_double * 10)(0.0, 0.0, 1.0, 0.0, 0.5, 0.7, 5.0, 0.9, 0.05, 0.5)
    ids = (ctypes.c_int64 * 2)(0, 1)
    logits = _floats(2 * 1000)
    kernels.mask(logits, 1000, (ctypes.c_uint32 * 64)(*range(64)), 32, ids, 2)
    kernels.sample(logits, 2, 1000, choices, ids)


def _compute_layers(kernels: Kernels, form: int, activation: int) -> None:
    packed = (ctypes.c_uint8 * kernels.packed_bytes(form, HIDDEN, HIDDEN))()
    weight = _floats(HIDDEN * HIDDEN)
    kernels.form(weight, HIDDEN, 1, HIDDEN, HIDDEN)
    kernels.pack(weight, HIDDEN, 1, HIDDEN, HIDDEN, form, packed)
    scale = _floats(HIDDEN)
    norm = NormPlan(_address(scale), 1e-5)
    part = LinearPart(_address(packed), _address(scale), None, None, HIDDEN, form)
    layer = LayerPlan(*[norm] * 4, *[part] * 7, HIDDEN, activation, HEADS, HEADS, DIM, 7, 0.25, 30.0)
    angles, between = _floats(TOKENS * DIM), [_floats(TOKENS * HIDDEN) for _ in range(7)]
    slots = (ctypes.c_int64 * TOKENS)(*range(TOKENS))
    spans, pages = (ctypes.c_int32 * 4)(0, TOKENS, TOKENS, 0), (ctypes.c_int32 * 1)(0)
    step = StepPlan(*map(_address, (angles, angles, slots, spans, pages)), TOKENS, 1, *map(_address, between))
    x, y = _floats(TOKENS * HIDDEN), _floats(TOKENS * HIDDEN)
    memory = [_floats(kernels.page_tokens * HIDDEN) for _ in range(4)]
    layers = (ctypes.c_void_p * 2)(*[ctypes.addressof(layer)] * 2)
    kernels.layers(layers, 2, ctypes.byref(step), x, y, (ctypes.c_void_p * 4)(*map(_address, memory)))


def _floats(count: int) -> Any:
    return (ctypes.c_float * count)(*(0.5 + i % 2 for i in range(count)))


def _address(values: Any) -> int:
    return ctypes.addressof(values)


def main() -> None:
    """Raises what `Kernels` raises."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    call_all(Kernels(int(sys.argv[1]), "a trial"))


if __name__ == "__main__":
    main()
