"""Has Triton kernels run in Triton's interpreter, on CPU tensors, where there is no GPU. A pytest plugin.

Triton asks the environment when a kernel is defined, so this must come before anything imports it.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any


def _has_driver() -> bool:
    """Without importing torch, which tests of other rooms don't need."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


if not _has_driver():
    os.environ["TRITON_INTERPRET"] = "1"


def teach_bfloat16(monkeypatch: Any) -> None:
    """The interpreter keeps bfloat16 as integers and would multiply those: widen them first, as a GPU's units do."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    def widened(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        wide = interpreter._convert_float(operand.data, tl.bfloat16, tl.float32, None).view(np.float32)
        return interpreter.TensorHandle(wide, tl.float32)

    def create_dot(builder: Any, a: Any, b: Any, *others: Any) -> Any:
        return as_it_was(builder, widened(a), widened(b), *others)

    as_it_was = interpreter.InterpreterBuilder.create_dot
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
