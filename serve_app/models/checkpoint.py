"""A model folder as files: which hold the weights, what their headers say, and whether all of it is there.

Reads headers only, never a tensor; knows nothing of torch. The safetensors format:
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve_app.models.model_error import ModelError

SAFETENSORS_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
PICKLE_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json")
"""A checkpoint's only file, or the index of its shards. transformers takes the first of these and of
`SAFETENSORS_WEIGHTS` that is there (`_get_resolved_checkpoint_files`), safetensors before pickles."""
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
"""Files of torch's distributed checkpoints, which transformers would take before all others."""
_MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""
_FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
"""Any one of them makes a tokenizer."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a safetensors file; `begin` and `end` are bytes after the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def is_float(self) -> bool:
        """Whether it holds numbers that a model computes with, in any precision."""
        return self.dtype in _FLOAT_DTYPES

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)


def is_safetensors(path: Path) -> bool:
    """By name: this room never guesses a format from contents."""
    return path.suffix == ".safetensors"


def header_bytes(path: Path) -> int:
    """Length of a safetensors file's header, its 8-byte length field included. Raises `ModelError`."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= _MAX_HEADER_BYTES or path.stat().st_size < 8 + length:
        raise _damaged(path)
    return 8 + length


def tensors(path: Path) -> list[TensorEntry]:
    """What a safetensors file's header lists. Raises `ModelError` when the header is damaged."""
    length = header_bytes(path)
    with path.open("rb") as file:
        raw = file.read(length)[8:]
    try:
        header = json.loads(raw)
        return [
            TensorEntry(name, entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
            for name, entry in header.items()
            if name != "__metadata__"
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path) from error


def weight_names(folder: Path, names: Collection[str]) -> list[str]:
    """Of the `names` of a folder's or repository's files, those with the weights, in order; empty without weights.

    `folder` holds config.json, where `transformers_weights` may name another file, and the index of the shards, if any.
    Raises `ModelError`.
    """
    named = read_json(folder / "config.json").get("transformers_weights")
    if named is None:
        named = next((name for name in (*SAFETENSORS_WEIGHTS, *PICKLE_WEIGHTS) if name in names), None)
    elif named not in names or not str(named).endswith((".safetensors", ".safetensors.index.json")):
        raise ModelError(
            f"config.json names {named!r} as the file of the weights (transformers_weights), and there is no "
            "safetensors file of that name beside it; fetch the model again."
        )
    if named is None:
        return []
    return _shards(folder / named) if named.endswith(".json") else [named]


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights, and that the loader reads, in name order; empty when there are none.

    Checks, memory plans, loading and fingerprints all use this list. Raises `ModelError`.
    """
    return [folder / name for name in weight_names(folder, {path.name for path in folder.iterdir()})]


def is_pickle(files: list[Path]) -> bool:
    """Whether weights come as pickles, which can run code when they are loaded."""
    return any(path.suffix == ".bin" for path in files)


def check_model_folder(folder: Path, *, allow_pickle: bool) -> None:
    """Raise `ModelError` unless config.json and every weight file are there, each at its full size."""
    read_json(folder / "config.json", missing=f"{folder} holds no model: it has no config.json.")
    if distributed := sorted(path.name for path in folder.iterdir() if _DISTRIBUTED.fullmatch(path.name)):
        raise ModelError(
            f"{folder} holds a distributed checkpoint ({distributed[0]}), which can't be served; convert it, or move "
            "it out of the folder."
        )
    files = weight_files(folder)
    if not files:
        adapter = (
            " It holds an adapter only; merge it into its base model." * (folder / "adapter_config.json").is_file()
        )
        raise ModelError(f"{folder} holds no weights (model.safetensors or its shards).{adapter}")
    for path in files:
        if not path.is_file():
            raise ModelError(f"{folder} lacks the shard {path.name}, which its index names; fetch the model again.")
    if is_pickle(files) and not allow_pickle:
        raise pickle_refused(str(folder))
    for path in files:
        if not is_safetensors(path):
            continue
        expected = header_bytes(path) + max((entry.end for entry in tensors(path)), default=0)
        if (actual := path.stat().st_size) != expected:
            raise ModelError(
                f"{path} is cut off or damaged: it has {actual:,} bytes and its header speaks of {expected:,}; "
                "fetch the file again."
            )


def check_tokenizer_folder(folder: Path) -> None:
    """Raise `ModelError` unless there is something to make a tokenizer from."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(
            f"{folder} holds no tokenizer (tokenizer.json or tokenizer.model); add the model's, or set model.tokenizer."
        )


def pickle_refused(source: str) -> ModelError:
    """The refusal of weights that only exist as pickles."""
    return ModelError(
        f"{source} has only pickle weights (pytorch_model.bin), which can run code when they are loaded; use a "
        "safetensors version, or set model.allow_pickle_weights: true if you trust who made them."
    )


def _shards(index: Path) -> list[str]:
    """Names of the files that an index lists, sorted. Raises `ModelError`."""
    names = read_json(index, missing=f"{index} is missing.").get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ModelError(f"{index} names no shards; fetch the file again.")
    shards = sorted({str(name) for name in names.values()})
    if outside := [name for name in shards if Path(name).name != name]:
        raise ModelError(f"{index} names shards outside of its folder, e.g. {outside[0]}; fetch the file again.")
    return shards


def read_json(path: Path, *, missing: str | None = None) -> dict[str, Any]:
    """The JSON object in a file; empty when there is no such file and `missing` is None.

    Raises `ModelError` for a damaged file, and with the text `missing`, if given, when there is no such file.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        if missing is None:
            return {}
        raise ModelError(missing) from error
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON; fetch the file again.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} is not a JSON object; fetch the file again.")
    return content


def _damaged(path: Path) -> ModelError:
    return ModelError(f"{path} is not a whole safetensors file; fetch the file again.")
