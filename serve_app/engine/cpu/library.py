"""The C++ of `kernels/` compiled for this processor, once, and called through ctypes.

The library shares torch's OpenMP pool: it needs the same `libgomp.so.1`, which torch has already loaded. Without a
C++ compiler, or where anything about it fails, there is no library and torch's own kernels serve.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from serve_app.engine.errors import EngineError

SOURCES = sorted(Path(__file__).with_name("kernels").glob("*.cpp"))
HEADERS = sorted(Path(__file__).with_name("kernels").glob("*.h"))
FLAGS = (
    *("-O3", "-march=native", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *("-fopenmp", "-fPIC", "-shared"),
)
COMPILE_LIMIT_S = 120
"""It takes 2 to 3 s."""

_int, _float, _pointer = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_SIGNATURES = {
    "serve_app_pack": [_pointer, _int, _int, _int, _int, _int, _pointer],
    "serve_app_linear": [_pointer, _int, _pointer, _int, _int, _int],
    "serve_app_gated": [_pointer, _int, _pointer, _pointer, _int, _pointer, _int, _int],
    "serve_app_rms_norm": [_pointer, _pointer, _float, _pointer, _int, _int],
    "serve_app_rotate": [_pointer, _pointer, _pointer, _int, _int, _int],
    "serve_app_layer": [_pointer, _pointer, _pointer, _pointer, _pointer, _pointer],
    "serve_app_layers": [_pointer, _int, _pointer, _pointer, _pointer, _pointer],
    "serve_app_sample": [_pointer, _int, _int, _pointer, _pointer],
    "serve_app_store": [_pointer, _pointer, _pointer, _int, _pointer, _pointer, _int, _int, _int],
    "serve_app_attend": [
        *(_pointer, _pointer, _pointer, _pointer, _pointer, _int, _pointer),
        *(_int, _int, _int, _int, _float, _float, _int),
    ],
}
_COUNTS = {
    "serve_app_form": [_pointer, _int, _int, _int, _int],
    "serve_app_packed_bytes": [_int, _int, _int],
    "serve_app_page_tokens": [],
}


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

    def __init__(self, path: Path) -> None:
        """Raises OSError when the library can't be loaded."""
        library = ctypes.CDLL(str(path))
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
        for name, arguments in _COUNTS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, _int
        self.form = library.serve_app_form
        self.packed_bytes = library.serve_app_packed_bytes
        self.pack = library.serve_app_pack
        self.linear = library.serve_app_linear
        self.gated = library.serve_app_gated
        self.rms_norm = library.serve_app_rms_norm
        self.rotate = library.serve_app_rotate
        self.layer = library.serve_app_layer
        self.layers = library.serve_app_layers
        self.sample = library.serve_app_sample
        self.store = library.serve_app_store
        self.attend = library.serve_app_attend
        self.key = path.stem
        """Changes with their source, the compiler and the processor's instructions."""
        self.page_tokens: int = library.serve_app_page_tokens()


def load_kernels(cache_dir: Path) -> Kernels:
    """Compile for this processor unless `cache_dir` has it already, and load.

    Raises:
        EngineError: there is no compiler, or it fails; the message says which and what to install.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if platform.system() != "Linux" or compiler is None:
        raise EngineError("there is no C++ compiler for the fast CPU kernels (on Debian: apt install g++)")
    try:
        path = cache_dir / f"{_key(compiler)}.so"
        if not path.exists():
            _compile(compiler, path)
        return Kernels(path)
    except subprocess.CalledProcessError as error:
        reason = (error.stderr or "").strip().splitlines()
        raise EngineError(f"{compiler} failed on the CPU kernels: {reason[0] if reason else error}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError(f"the CPU kernels can't be compiled or loaded: {error}") from error


def _key(compiler: str) -> str:
    """Changes with the source, the flags, the compiler and the processor that `-march=native` stands for."""
    native = subprocess.run(
        [compiler, "-march=native", "-Q", "--help=target"], capture_output=True, text=True, timeout=COMPILE_LIMIT_S
    ).stdout
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=COMPILE_LIMIT_S).stdout
    code = (path.read_text() for path in (*SOURCES, *HEADERS))
    parts = (*code, *FLAGS, compiler, version, native, platform.machine())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _compile(compiler: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Several replicas may start at once: each compiles a file of its own, and the last rename wins.
    with tempfile.TemporaryDirectory(dir=path.parent) as work:
        made = Path(work) / path.name
        subprocess.run(
            [compiler, *FLAGS, "-o", str(made), *map(str, SOURCES)],
            check=True, capture_output=True, text=True, timeout=COMPILE_LIMIT_S,
        )  # fmt: skip
        made.replace(path)
