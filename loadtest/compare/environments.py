"""A virtual environment for each peer, outside the repository, installed once.

Promises that a complete environment is used as it is, that one with other requirements is made anew, and that a failed
installation is an `InstallationFailed` with the installer's own reason. Knows nothing of what is installed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

INSTALL_TIMEOUT_S = 3600
"""llama.cpp compiles for 15 minutes on two cores."""
_MARK = "complete"


class InstallationFailed(Exception):
    """Why a peer is absent, in the installer's words."""


@dataclass(frozen=True, slots=True)
class Environment:
    """What is to be installed."""

    name: str
    """Of its folder."""
    requirements: tuple[str, ...]
    """pip's requirement specifiers."""
    unwanted: tuple[str, ...] = ()
    """Dependencies that are removed again: they break the peer or are not used."""
    variables: tuple[tuple[str, str], ...] = ()
    """Of the installer's environment: how something that compiles is compiled."""

    @property
    def recipe(self) -> str:
        """Changes with anything that changes what is installed."""
        parts = (sys.version, *self.requirements, "without", *self.unwanted, "with", *map(str, self.variables))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def python_of(folder: Path) -> Path:
    """The interpreter of an environment."""
    return folder / "bin" / "python"


def install(environment: Environment, root: Path, torch_index: str | None) -> Path:
    """The interpreter of the installed environment under `root`. Raises `InstallationFailed`.

    `torch_index` is an extra package index, for torch builds that the configured one does not have.
    """
    folder = root / environment.name
    if is_installed(environment, root):
        return python_of(folder)
    print(f"installing {environment.name} into {folder} ...", flush=True)
    root.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    log = root / f"{environment.name}.install.log"
    log.unlink(missing_ok=True)
    _run([sys.executable, "-m", "venv", str(folder)], log)
    pip = [str(python_of(folder)), "-m", "pip", "--disable-pip-version-check", "--no-input"]
    command = [*pip, "install", *environment.requirements]
    if torch_index:
        command += ["--extra-index-url", torch_index]
    _run(command, log, dict(environment.variables))
    if environment.unwanted:
        _run([*pip, "uninstall", "--yes", *environment.unwanted], log)
    (folder / _MARK).write_text(environment.recipe)
    return python_of(folder)


def is_installed(environment: Environment, root: Path) -> bool:
    """Whether it is there, whole and of this recipe."""
    mark = root / environment.name / _MARK
    return mark.exists() and mark.read_text() == environment.recipe


def version_of(python: Path, distribution: str) -> str:
    """The installed version of a distribution in another environment. Raises `subprocess.CalledProcessError`."""
    code = f"import importlib.metadata as m; print(m.version({distribution!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def _run(command: list[str], log: Path, variables: Mapping[str, str] | None = None) -> None:
    """Append its output to `log`. Raises `InstallationFailed` with the line that says why."""
    with log.open("a") as output:
        try:
            status = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | dict(variables or {}),
                timeout=INSTALL_TIMEOUT_S,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            raise InstallationFailed(f"not installed after {INSTALL_TIMEOUT_S} s; see {log}") from None
    if status:
        raise InstallationFailed(f"{reason_in(log.read_text(errors='replace'))} (see {log})")


def reason_in(output: str) -> str:
    """The line of pip's output that says why it failed: its last error, else its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error:")]
    return (errors or lines or ["no output"])[-1].removeprefix("ERROR: ")
