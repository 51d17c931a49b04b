"""The C++ of `kernels/` compiled for this processor, once, and called through ctypes.

The library shares torch's OpenMP pool: it needs the same `libgomp.so.1`, which torch has already loaded. Without a
C++ compiler, or where anything about it fails, there is no library and torch's own kernels serve. Promises that
nothing is loaded that another user could have written, and that a library that can't run on this processor ends a
process of its own and not this one.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from serve_app.engine.cpu.compiler import Compiler, compiler_command, processor_key
from serve_app.engine.engine_error import EngineError
from serve_app.private_files import make_private_folder, open_own_file

logger = logging.getLogger(__name__)

TRIAL_LIMIT_S = 60
"""A trial takes 0.3 s."""

_int, _float, _pointer = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class LinearPart(ctypes.Structure):
    """`Part` of `kernels/linear.cpp`: one of several products of the same input."""

    _fields_ = (
        *(("packed", _pointer), ("bias", _pointer), ("addend", _pointer), ("result", _pointer)),
        *(("columns", _int), ("form", _int)),
    )  # fmt: skip


class NormPlan(ctypes.Structure):
    """`Norm` of `kernels/layer.cpp`."""

    _fields_ = (("scale", _pointer), ("eps", ctypes.c_double))


class LayerPlan(ctypes.Structure):
    """`LayerPlan` of `kernels/layer.cpp`: the weights and the shape of a decoder layer."""

    _fields_ = (
        *((name, NormPlan) for name in ("before_attention", "before_mlp", "of_queries", "of_keys")),
        *((name, LinearPart) for name in ("query", "key", "value", "output", "gate", "up", "down")),
        *((name, _int) for name in ("hidden", "activation", "heads", "kv_heads", "head_dim", "window")),
        *((name, ctypes.c_double) for name in ("scaling", "softcap")),
    )


class StepPlan(ctypes.Structure):
    """`StepPlan` of `kernels/layer.cpp`: what the layers of a step share."""

    _fields_ = (
        *((name, _pointer) for name in ("cos", "sin", "slots", "spans", "pages")),
        *((name, _int) for name in ("tokens", "sequences")),
        *((name, _pointer) for name in ("normed", "gated", "middle", "queries", "keys", "values", "attended")),
    )


class Kernels:
    """The functions of `kernels/`; their arguments are described there. Pointers are `tensor.data_ptr()`."""

    def __init__(self, descriptor: int, key: str) -> None:
        """Loads the library file that is open as `descriptor`, by its path in `/proc/self/fd`.

        The descriptor is never closed. If a later library got its number, the loader would take it for this one.

        Raises OSError when it can't be loaded, AttributeError when it lacks a function.
        """
        library = ctypes.CDLL(f"/proc/self/fd/{descriptor}")

        def function(name: str, *arguments: Any, returns: Any = None) -> Any:
            found = getattr(library, f"serve_app_{name}")
            found.argtypes, found.restype = arguments, returns
            return found

        self.pack = function("pack", _pointer, _int, _int, _int, _int, _int, _pointer)
        self.form = function("form", _pointer, _int, _int, _int, _int, returns=_int)
        self.packed_bytes = function("packed_bytes", _int, _int, _int, returns=_int)
        self.linear = function("linear", _pointer, _int, _pointer, _int, _int, _int)
        self.gated = function("gated", _pointer, _int, _pointer, _pointer, _int, _pointer, _int, _int)
        self.rms_norm = function("rms_norm", _pointer, _pointer, _float, _pointer, _int, _int)
        self.rotate = function("rotate", _pointer, _pointer, _pointer, _int, _int, _int)
        self.layer = function("layer", *[_pointer] * 6)
        self.layers = function("layers", _pointer, _int, *[_pointer] * 4)
        self.sample = function("sample", _pointer, _int, _int, _pointer, _pointer)
        self.mask = function("mask", _pointer, _int, _pointer, _int, _pointer, _int)
        self.store = function("store", *[_pointer] * 3, _int, _pointer, _pointer, _int, _int, _int)
        self.attend = function("attend", *[_pointer] * 5, _int, _pointer, *[_int] * 4, _float, _float, _int)
        self.key = key
        """Changes with the kernels' source, the compiler and the processor's instructions."""
        self.page_tokens: int = function("page_tokens", returns=_int)()


def load_kernels(cache_dir: Path) -> Kernels:
    """Load the kernels from this user's folder in `cache_dir`, compiled for this processor if they are not there yet.

    Where that folder can't be used, they are compiled in a temporary one.

    Raises:
        EngineError: there is no compiler, or it fails; the message says which and what to install.
    """
    compiler = Compiler(compiler_command())
    name = f"{compiler.key}-{processor_key()}.so"
    own = cache_dir / str(os.geteuid())
    try:
        return _load_from(own / name, compiler)
    except OSError as error:
        reason = str(error)
    try:
        with tempfile.TemporaryDirectory(prefix="serve_app-") as temporary:  # of mode 0700
            kernels = _load_from(Path(temporary) / name, compiler)
    except OSError as error:
        raise EngineError(f"the CPU kernels can't be compiled or loaded: {reason}; {error}") from error
    logger.warning("the CPU kernels can't be kept in %s (%s): each start compiles them", own, reason)
    return kernels


def _load_from(path: Path, compiler: Compiler) -> Kernels:
    """Raises OSError when the folder can't be used, EngineError when another folder would not help either."""
    make_private_folder(path.parent)
    try:
        return Kernels(open_own_file(path), compiler.key)
    except FileNotFoundError:
        pass
    except (OSError, AttributeError) as error:
        logger.warning("%s is compiled again: %s", path, error)
    # Several replicas may start at once: each compiles a file of its own, and the last rename wins.
    with tempfile.TemporaryDirectory(dir=path.parent) as work:
        made = Path(work) / path.name
        compiler.compile(made)
        made.chmod(0o700)
        descriptor = open_own_file(made)
        os.fsync(descriptor)  # a power cut must not leave the name without its contents
        _try(descriptor)
        kernels = Kernels(descriptor, compiler.key)
        made.replace(path)
    return kernels


def _try(descriptor: int) -> None:
    """Call every kernel of a new library in a child process. Raises EngineError unless the child succeeds."""
    command = (sys.executable, "-P", "-m", "serve_app.engine.cpu.trial", str(descriptor))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    try:
        tried = subprocess.run(
            command, env=environment, pass_fds=(descriptor,), stdin=subprocess.DEVNULL,
            capture_output=True, text=True, errors="replace", timeout=TRIAL_LIMIT_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise EngineError(f"a trial of the CPU kernels took more than {TRIAL_LIMIT_S} s") from error
    if tried.returncode == -signal.SIGILL:
        raise EngineError("the CPU kernels were compiled for another processor: a trial of them was ended by SIGILL")
    if tried.returncode < 0:  # SIGKILL: main memory is short
        raise EngineError(f"a trial of the CPU kernels was ended by {signal.Signals(-tried.returncode).name}")
    if tried.returncode:
        lines = tried.stderr.strip().splitlines()
        raise EngineError(f"a trial of the CPU kernels failed: {lines[-1] if lines else tried.returncode}")
