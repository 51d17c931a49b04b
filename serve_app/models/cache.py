"""Where fetched and converted models are kept, and how a folder gets there whole or not at all.

Promises that a folder it calls complete was finished by its builder and has every file at its full size, that two
processes never build the same one twice, and that a crash leaves nothing a later start would trust.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from serve_app.core import LoadStage
from serve_app.home import user_folder
from serve_app.models.model_error import ModelError

Progress = Callable[[LoadStage], None]

_MANIFEST = "serve_app.json"
_WAIT_NOTE_PERIOD_S = 0.2


def cache_directory(configured: str | None = None) -> Path:
    """The folder for fetched and converted models; not created yet.

    `configured` is `AppConfig.cache_dir`; then $SERVE_APP_CACHE, $XDG_CACHE_HOME/serve_app, ~/.cache/serve_app.
    Raises `ModelError` where the user has no home and no folder that could stand for it.
    """
    try:
        return user_folder(configured or os.environ.get("SERVE_APP_CACHE"), "XDG_CACHE_HOME", ".cache")
    except OSError as error:
        raise ModelError(
            f"The cache folder can't be made ({error}); set cache_dir (or SERVE_APP_CACHE) to a writable folder."
        ) from error


def build_once(
    folder: Path, version: str, build: Callable[[Path], tuple[str, ...]], progress: Progress
) -> tuple[str, ...]:
    """Have `folder` as `build` makes it: at once when it is there and complete, else built next to it and renamed.

    `build` fills the empty folder it is given and returns notes for the user, which are returned each time. `version`
    names the way it is built: a folder of another version is built again. Raises `ModelError` when the disk is full or
    can't be written; what else `build` raises passes through, and nothing half-made stays.
    """
    try:
        if (notes := find_built(folder, version)) is not None:
            return notes
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _exclusive(folder.with_name(f".{folder.name}.lock"), folder.name, progress):
            if (notes := find_built(folder, version)) is not None:  # another process built it while this one waited
                return notes
            return _build(folder, version, build)
    except OSError as error:
        raise disk_error(folder.parent, error) from error


def find_built(folder: Path, version: str) -> tuple[str, ...] | None:
    """The notes of the folder's builder when it is complete and of this version, else None. Takes no lock."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        whole = all((folder / name).stat().st_size == size for name, size in manifest["files"].items())
        return tuple(manifest["notes"]) if whole and manifest["version"] == version else None
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None  # not built, or not by this code: it will be


def disk_error(folder: Path, error: OSError) -> ModelError:
    """The sentence for an operating-system error met while writing under `folder`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ModelError(
            f"The disk that holds {folder} is full; free some space, or set cache_dir (or SERVE_APP_CACHE) "
            "to a folder on a larger disk."
        )
    return ModelError(
        f"The cache folder {folder} can't be used ({error.strerror or error}); make it writable, or set cache_dir "
        "(or SERVE_APP_CACHE) to another folder."
    )


def require_space(folder: Path, needed_bytes: int) -> None:
    """Raise `ModelError` unless the disk that holds the existing `folder` has `needed_bytes` free."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise ModelError(
            f"{needed_bytes / 1e9:.1f} GB are needed in {folder} and {free / 1e9:.1f} GB are free; free some space, "
            "or set cache_dir (or SERVE_APP_CACHE) to a folder on a larger disk."
        )


def _build(folder: Path, version: str, build: Callable[[Path], tuple[str, ...]]) -> tuple[str, ...]:
    partial = folder.with_name(f".{folder.name}.partial")
    for leftover in (partial, folder):  # of a crash or another version; open files keep their contents
        if leftover.exists():
            shutil.rmtree(leftover)
    partial.mkdir()
    try:
        notes = build(partial)
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        for path in files:
            _flush(path)
        sizes = {str(path.relative_to(partial)): path.stat().st_size for path in files}
        manifest = partial / _MANIFEST
        manifest.write_text(json.dumps({"version": version, "notes": notes, "files": sizes}, indent=1))
        _flush(manifest)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return notes


def _flush(path: Path) -> None:
    """Write to disk: a power cut after the rename must not leave files of the right size without their contents."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def _exclusive(lock: Path, name: str, progress: Progress) -> Iterator[None]:
    """Hold the lock file; it is freed when the process ends, however it ends."""
    held = FileLock(lock, timeout=_WAIT_NOTE_PERIOD_S, fallback_to_soft=False)  # a soft lock would outlive a crash
    while not held.is_locked:
        try:
            held.acquire()
        except Timeout:
            progress(LoadStage(f"waiting for another process to prepare {name}"))
    try:
        yield
    finally:
        held.release()
