"""Turns `model.source` into folders on this machine: the demo model, the hub, a local folder, a GGUF file.

Promises that what it returns is whole (config, tokenizer, every shard at full length). Loads no weights.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from serve_app.config import ModelConfig
from serve_app.core import LoadStage
from serve_app.home import expanded
from serve_app.models.cache import Progress, build_once, find_built
from serve_app.models.checkpoint import check_model_folder, check_tokenizer_folder
from serve_app.models.conversion import CONVERSION_VERSION, convert
from serve_app.models.demo import DEMO_HUB_ID, DEMO_NAME, demo_place, ensure_demo_model
from serve_app.models.fingerprint import sampled_digest
from serve_app.models.gguf_files import gguf_name, gguf_parts
from serve_app.models.model_error import ModelError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class SourceKind(StrEnum):
    """Where weights come from."""

    DEMO = "demo"
    HUB = "hub"
    FOLDER = "folder"
    GGUF = "gguf"


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on this machine's disk."""

    folder: Path
    """config.json, generation_config.json and, unless only the tokenizer was asked for, the weights."""
    tokenizer_folder: Path
    name: str
    """What clients call it."""
    kind: SourceKind
    revision: str | None = None
    """The hub's commit."""
    notes: tuple[str, ...] = ()
    """What a user should know, e.g. what a conversion lost."""


def source_kind(source: str) -> SourceKind:
    """Where a `model.source` points. Raises `ModelError` when it is neither a name nor a path that exists."""
    if source == SourceKind.DEMO:
        return SourceKind.DEMO
    path = expanded(source)
    if source.lower().endswith(".gguf"):
        if not path.is_file():
            raise ModelError(f"There is no file {path.absolute()}; model.source names a GGUF file on this machine.")
        return SourceKind.GGUF
    if source and path.is_dir():
        return SourceKind.FOLDER
    if path.is_file():
        raise ModelError(f"{path} is a file; model.source is a model's folder, a .gguf file, a hub id or `demo`.")
    if _HUB_ID.fullmatch(source):
        return SourceKind.HUB
    raise ModelError(
        f"model.source {source!r} is no folder on this machine and no hub id (owner/name); give one of them, a .gguf "
        "file or `demo`."
    )


def resolve(model: ModelConfig, cache_dir: Path, *, tokenizer_only: bool = False, progress: Progress) -> ModelFiles:
    """Fetch and convert what is not here yet, and check that it is whole.

    `tokenizer_only` leaves a hub model's weights where they are: an ingress needs only config and tokenizer.
    Raises `ModelError`.
    """
    files = _resolve_source(model, cache_dir, tokenizer_only, progress)
    if model.tokenizer is not None:
        other = ModelConfig(source=model.tokenizer, revision=model.tokenizer_revision)
        folder = _resolve_source(other, cache_dir, True, progress).tokenizer_folder
        files = replace(files, tokenizer_folder=folder)
    check_tokenizer_folder(files.tokenizer_folder)
    if not tokenizer_only:
        check_model_folder(files.folder, allow_pickle=model.allow_pickle_weights)
    return files


def find(model: ModelConfig, cache_dir: Path) -> ModelFiles | None:
    """The model's files if all are on this machine already, else None: nothing is fetched or converted.

    Raises `ModelError` for a source that is neither a name nor a path that exists, and for a damaged model.
    """
    kind = source_kind(model.source)
    path = expanded(model.source)
    folder: Path | None
    if kind is SourceKind.HUB:
        from serve_app.models import hub  # seconds of imports that no other source needs

        folder = hub.cached(model, tokenizer_only=False)
    elif kind is SourceKind.FOLDER:
        folder = path.resolve()
    else:
        place, version = demo_place(cache_dir) if kind is SourceKind.DEMO else _converted_place(path, cache_dir)
        folder = place if find_built(place, version) is not None else None
    if folder is None:
        return None
    try:
        check_model_folder(folder, allow_pickle=model.allow_pickle_weights)
    except ModelError:
        if kind is SourceKind.HUB:  # an interrupted fetch, which can be continued, and no damage
            return None
        raise
    return ModelFiles(folder, folder, model.served_model_name or own_name(model.source, kind), kind)


def own_name(source: str, kind: SourceKind) -> str:
    """The name that a model has by its source: the last part of a hub id, a folder's or a file's name."""
    if kind is SourceKind.DEMO:
        return DEMO_NAME
    if kind is SourceKind.HUB:
        return source.rsplit("/", 1)[-1]
    path = expanded(source)
    return gguf_name(path) if kind is SourceKind.GGUF else path.resolve().name


def aliases(model: ModelConfig) -> frozenset[str]:
    """The names by which clients may call a model besides its served name; none of them means another model.

    They are the source as the config has it, and its last part: a hub id's, a folder's or a file's own name. The demo
    model also has its makers' hub id. Raises `ModelError` for a source that is neither a name nor a path that exists.
    """
    kind, path = source_kind(model.source), expanded(model.source)
    if kind is SourceKind.GGUF:
        return frozenset({model.source, path.name, path.stem})
    other = {DEMO_HUB_ID} if kind is SourceKind.DEMO else set()
    return frozenset({model.source, own_name(model.source, kind), *other})


def _resolve_source(model: ModelConfig, cache_dir: Path, tokenizer_only: bool, progress: Progress) -> ModelFiles:
    kind = source_kind(model.source)
    path = expanded(model.source)
    revision: str | None = None
    notes: tuple[str, ...] = ()
    if kind is SourceKind.DEMO:
        folder = ensure_demo_model(cache_dir, progress)
    elif kind is SourceKind.GGUF:
        progress(LoadStage("reading the GGUF file"))
        folder, version = _converted_place(path, cache_dir)
        notes = build_once(folder, version, lambda empty: convert(path.absolute(), empty, progress), progress)
    elif kind is SourceKind.FOLDER:
        folder = path.resolve()
    else:
        from serve_app.models import hub

        folder, revision = hub.fetch(model, tokenizer_only=tokenizer_only, progress=progress)
    name = model.served_model_name or own_name(model.source, kind)
    return ModelFiles(folder, folder, name, kind, revision, notes)


def _converted_place(gguf: Path, cache_dir: Path) -> tuple[Path, str]:
    """Where the conversion of these very bytes is kept, and the version it must have."""
    digests = [sampled_digest(part) for part in gguf_parts(gguf)]
    digest = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    return cache_dir / "models" / f"{gguf_name(gguf)}-{digest[:16]}", f"{digest}/{CONVERSION_VERSION}"
