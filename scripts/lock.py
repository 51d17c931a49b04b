"""Writes constraints/locks/*.txt, the hashes of the pinned versions: `make lock`, after a pin has changed.

uv resolves for all Pythons and systems at once (`--universal`). torch and the CUDA packages that it brings on Linux
have a file of their own: where torch comes from depends on the machine, and PyTorch's own builds for CPUs have other
hashes and need none of those packages.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCKS = Path("constraints", "locks")
PINS = (Path("constraints", "cpu.txt"), Path("constraints", "gpu.txt"))
INDEX = "https://pypi.org/simple"
"""The lock holds the hashes of these files, whatever index the machine that writes the lock is told to use."""
IN_BOTH = {"torch", "triton"}
"""Pinned for CPUs too, and brought by PyPI's torch."""


def pinned(pins: Path) -> set[str]:
    """Names of the packages in a file of pins."""
    return set(re.findall(r"^([\w.-]+)==", (ROOT / pins).read_text(encoding="utf-8"), re.MULTILINE))


def lock(target: Path, wanted: Sequence[str], without: Iterable[str], stdin: str = "") -> None:
    """Write the hashes of `wanted` and of all that it needs, `without` some. Raises `CalledProcessError` as uv does."""
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or "uv"
    command = [uv, "pip", "compile", *wanted, "--output-file", str(target), "--quiet"]
    command += ["--universal", "--python-version", "3.11", "--generate-hashes", "--default-index", INDEX]
    command += ["--no-annotate", "--custom-compile-command", "make lock"]
    command += [word for pins in PINS for word in ("--constraint", str(pins))]
    # pip-audit needs pip, which every environment has: an installer that replaces itself may fail half-way.
    command += [word for name in ["pip", *sorted(without)] for word in ("--no-emit-package", name)]
    subprocess.run(command, cwd=ROOT, input=stdin, text=True, check=True)


def main() -> None:
    """Write all locks."""
    every, cuda = (pinned(pins) for pins in PINS)
    lock(LOCKS / "runtime.txt", ["pyproject.toml"], cuda | IN_BOTH)
    lock(LOCKS / "development.txt", ["pyproject.toml", "--extra", "dev"], cuda | {"torch"})
    lock(LOCKS / "torch.txt", ["-"], every - IN_BOTH, "torch")


if __name__ == "__main__":
    main()
