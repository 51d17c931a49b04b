"""Finds this machine's C++ compiler and compiles the kernels into one library.

Promises that two libraries of the same name come from the same source and compiler, for processors with the same
instructions.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from serve_app.engine.engine_error import EngineError

SOURCES = sorted(Path(__file__).with_name("kernels").glob("*.cpp"))
HEADERS = sorted(Path(__file__).with_name("kernels").glob("*.h"))
FLAGS = (
    *("-O3", "-march=native", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *("-fopenmp", "-fPIC"),
)
COMPILE_LIMIT_S = 120
"""Compiling takes 2 to 3 s."""
NO_COMPILER = "there is no C++ compiler for the fast CPU kernels (on Debian: apt install g++)"
_CPUINFO = Path("/proc/cpuinfo")
_CPUINFO_BYTES = 16384
"""The part to read: the first processor's entry is shorter. With hundreds of processors the whole file takes long."""
_FEATURES = ("flags", "Features", "isa", "uarch", "vendor_id", "cpu family", "model", "CPU implementer", "CPU part")


class Compiler:
    """A command that compiles C++."""

    def __init__(self, command: Sequence[str]) -> None:
        """Asks the compiler for its version and its macros. Raises EngineError when it can't be run or refuses."""
        self._command = tuple(command)
        # The predefined macros name the instructions that `-march=native` stands for, with GCC and with Clang.
        macros = self._output(*FLAGS, "-dM", "-E", "-x", "c++", os.devnull)
        code = (path.read_text() for path in (*SOURCES, *HEADERS))
        self.key = _digest(*code, *FLAGS, *self._command, self._output("--version"), macros, platform.machine())
        """Changes with the source, the flags, the compiler and the instructions that it uses."""

    def compile(self, path: Path) -> None:
        """Write the library to `path`. Raises EngineError with the first line of the compiler's errors."""
        self._output(*FLAGS, "-shared", "-o", str(path), *map(str, SOURCES))

    def _output(self, *arguments: str) -> str:
        name = shlex.join(self._command)
        try:
            done = subprocess.run(
                [*self._command, *arguments],
                check=True, capture_output=True, text=True, errors="replace", timeout=COMPILE_LIMIT_S,
                stdin=subprocess.DEVNULL, env={**os.environ, "LC_ALL": "C"},
            )  # fmt: skip
        except subprocess.CalledProcessError as error:
            reason = (error.stderr or "").strip().splitlines()
            raise EngineError(f"{name} failed on the CPU kernels: {reason[0] if reason else error}") from error
        except subprocess.TimeoutExpired as error:
            raise EngineError(f"{name} took more than {COMPILE_LIMIT_S} s for the CPU kernels") from error
        except OSError as error:
            raise EngineError(f"{name} can't be run to compile the CPU kernels: {error.strerror}") from error
        return done.stdout


def compiler_command() -> list[str]:
    """$CXX, which may have arguments (`ccache g++`), else g++ or c++. Raises EngineError when there is none."""
    if platform.system() != "Linux":
        raise EngineError("the fast CPU kernels are for Linux only")
    if own := os.environ.get("CXX", "").strip():
        try:
            return shlex.split(own)
        except ValueError as error:
            raise EngineError(f"CXX={own} is no command: {error}") from error
    found = shutil.which("g++") or shutil.which("c++")
    if found is None:
        raise EngineError(NO_COMPILER)
    return [found]


def processor_key() -> str:
    """A key that changes with the features of this machine's processors, whether or not the compiler uses them."""
    try:
        with _CPUINFO.open("rb", buffering=0) as file:
            first = file.read(_CPUINFO_BYTES).decode(errors="replace").partition("\n\n")[0]
    except OSError:
        first = platform.processor()
    known = [line for line in first.splitlines() if line.partition(":")[0].strip() in _FEATURES]
    return _digest(platform.machine(), *(known or [first]))


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
