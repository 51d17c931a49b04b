"""Installs this project into the environment of the Python that runs it: `install.py --constraint FILE REQUIREMENT`.

Decides who installs (uv where there is one, else pip) and where torch comes from. On Linux PyPI's torch brings CUDA,
gigabytes of it; a machine without a GPU takes PyTorch's own build for CPUs where its index can be reached. Whoever has
told the installer where to look is obeyed. Needs the standard library only.

With `--lock FILE` only wheels with the hashes of that file are installed. torch alone may come without one: its hash is
known if it comes from PyPI (`torch.txt` beside FILE), but not if it is a build for CPUs or comes from where the
installer was told to look.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
ANSWERS_WITHIN_S = 5.0
CUDA_BYTES = 2_730_000_000
"""torch 2.13.0 for Linux on x86-64 with all the packages that it brings, of constraints/gpu.txt."""
CPU_BYTES = 192_000_000
"""torch 2.13.0+cpu for the same, which brings none of them."""

_WITHOUT_HASHES = (
    "The set-up with the hashes of {} has failed. They are those of the wheels on PyPI. If your index has files of its "
    "own, or PyPI no wheel for this machine, `make ... HASHES=` installs the same versions without hashes."
)
_HASHED = ["--require-hashes", "--no-deps", "--only-binary", ":all:", "--requirement"]
"""Wheels only: a source distribution would run its build, with build tools of any version and hash."""

_PLACES = ("index-url", "extra-index-url", "find-links", "no-index")
"""pip's settings, and uv's in its files, that say where packages lie."""
_WAYS = (*_PLACES, "cert", "client-cert", "proxy", "trusted-host", "keyring-provider")
"""These, and those that say how to get there."""
_UV_PLACES = ("UV_INDEX", "UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS", "UV_NO_INDEX")
_UV_CHOICE = "UV_TORCH_BACKEND"
"""uv's own setting for what is decided here."""


def main(words: Sequence[str] | None = None) -> int:
    """Install, or print the index; the installer's exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--constraint", type=Path, help="versions")
    parser.add_argument("--gpu", action="store_true", help="for a GPU, whether or not this machine has one")
    parser.add_argument("--torch-index", default="", help="a package index for torch, whatever this machine has")
    parser.add_argument("--print-torch-index", action="store_true", help="only say which one would be used")
    parser.add_argument("requirement", nargs="?", default=".", help="this project, with its extras (default: .)")
    parser.add_argument("--lock", type=Path, help="hashes: install nothing else but what it lists, and torch")
    arguments = parser.parse_args(words)
    ways = pip_settings() & set(_WAYS)
    uv = None if ways and not uv_is_told(os.environ) else shutil.which("uv")
    told = uv_is_told(os.environ) or _UV_CHOICE in os.environ if uv else bool(ways & set(_PLACES))
    here = arguments.lock is not None and is_installed("torch", arguments.lock.with_name("torch.txt"))
    index = arguments.torch_index or ("" if arguments.gpu or told or here else cpu_index())
    if arguments.print_torch_index:
        print(index)
        return 0
    start, pins = installer(uv, ""), _constrained(arguments.constraint)
    project = ["--no-build-isolation", "--editable", arguments.requirement]
    # The pinned setuptools builds it: what is set up once needs no network to be set up again.
    if arguments.lock is None:
        start = installer(uv, index) + pins
        return run([*start, "setuptools"]) or run([*start, *project])
    status = run([*start, *_HASHED, str(arguments.lock)])
    if not status and not (index or told or here):
        status = run([*start, *_HASHED, str(arguments.lock.with_name("torch.txt"))])
    if status:
        print(_WITHOUT_HASHES.format(arguments.lock), file=sys.stderr)
        return status
    # With the packages that this build of torch needs and that no lock lists.
    return run([*installer(uv, index), *pins, "torch"]) or run([*start, "--no-deps", *project])


def run(command: Sequence[str]) -> int:
    """Run it; its exit status."""
    return subprocess.run(command, check=False).returncode


def is_installed(package: str, lock: Path) -> bool:
    """Whether this environment has the version that the lock lists, of whatever build (`2.13.0+cpu` is 2.13.0)."""
    pinned = re.search(rf"^{package}==([^\s;]+)", lock.read_text(encoding="utf-8"), re.MULTILINE)
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return pinned is not None and version.partition("+")[0] == pinned[1]


def installer(uv: str | None, torch_index: str) -> list[str]:
    """The beginning of a command, up to what is to be installed."""
    if uv is not None:
        command = [uv, "pip", "install", "--python", sys.executable]
    else:
        command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
    if torch_index:
        command += ["--extra-index-url", torch_index]
        if uv is not None:  # as pip does: PyTorch's index holds other packages too, some of them old
            command += ["--index-strategy", "unsafe-best-match"]
    return command


def _constrained(pins: Path | None) -> list[str]:
    return ["--constraint", str(pins)] if pins else []


def pip_settings() -> set[str]:
    """What pip has been told, by files or the environment: names of settings."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    names = (line.partition("=")[0].rpartition(".")[2] for line in listed.stdout.splitlines())
    return {name.strip().replace("_", "-") for name in names}


def uv_is_told(environment: Mapping[str, str]) -> bool:
    """Whether uv has been told where packages lie: by its variables or one of its files."""
    if any(environment.get(name) for name in _UV_PLACES):
        return True
    own = environment.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    files = [environment.get("UV_CONFIG_FILE"), os.path.join(own, "uv", "uv.toml"), "/etc/uv/uv.toml", "uv.toml"]
    return any(_says_where(Path(file)) for file in files if file and os.path.isfile(file))


def _says_where(file: Path) -> bool:
    """Whether this file of uv's does; of one that can't be read uv itself will complain."""
    try:
        said = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return any(key in table for table in (said, said.get("pip", {})) for key in ("index", *_PLACES))


def cpu_index() -> str:
    """PyTorch's index of builds for CPUs, or nothing where PyPI's build is the right one or the only one."""
    if sys.platform != "linux" or has_gpu():
        return ""
    if answers(CPU_INDEX + "/torch/"):
        print(f"No GPU here: torch comes from {CPU_INDEX} ({_size(CPU_BYTES)}).", file=sys.stderr, flush=True)
        return CPU_INDEX
    print(
        f"No GPU here, but {CPU_INDEX} does not answer: torch comes with CUDA, {_size(CUDA_BYTES)} to fetch in place "
        f"of {_size(CPU_BYTES)}. TORCH_INDEX=URL names another index.",
        file=sys.stderr,
        flush=True,
    )
    return ""


def has_gpu(root: Path = Path("/")) -> bool:
    """Whether NVIDIA's driver is on this machine."""
    places = ("dev/nvidia0", "proc/driver/nvidia")
    return shutil.which("nvidia-smi") is not None or any((root / place).exists() for place in places)


def answers(url: str) -> bool:
    """Whether it can be fetched, all in all within `ANSWERS_WITHIN_S`: resolving a name has no limit of its own."""
    request = urllib.request.Request(url, headers={"User-Agent": "serve_app-setup"})
    found, ended = threading.Event(), threading.Event()

    def ask() -> None:
        # No network, a proxy that refuses, the status of an error: it does not answer.
        with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
            urllib.request.urlopen(request, timeout=ANSWERS_WITHIN_S).close()
            found.set()
        ended.set()

    threading.Thread(target=ask, daemon=True).start()
    ended.wait(ANSWERS_WITHIN_S)
    return found.is_set()


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


if __name__ == "__main__":
    sys.exit(main())
