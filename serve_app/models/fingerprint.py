"""Identity of a set of weights, the same on every machine that holds the same files.

Promises not to depend on paths or times, and to cost a bounded number of small reads: every header and a block from
the middle of the tensors (up to 2,048 of them), not every byte. So an edit inside one tensor that spares its middle
goes unseen: that is the risk taken. A fine-tune, another quantisation or a damaged download changes whole tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from serve_app.config import ModelConfig
from serve_app.core import Fingerprint
from serve_app.models.checkpoint import header_bytes, is_safetensors, tensors, weight_files

_FORMAT = "1"
_BLOCK_BYTES = 4096
_MAX_BLOCKS = 2048
"""0.1 s from a warm cache; a few seconds from a cold network file system."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")
_VOLATILE = frozenset({"transformers_version", "_name_or_path"})
"""Keys of config.json that say who wrote it, not what it describes."""


def fingerprint(folder: Path, tokenizer_folder: Path, model: ModelConfig, dtype: str, angles: str = "") -> Fingerprint:
    """32 hex digits over the config, the tokenizer, the weights, and how they are held (`dtype` is the resolved one).

    `angles`: which set of its rotary embedding's angles is used, where a model has several.

    Raises OSError when a file can't be read and ValueError when config.json isn't JSON.
    """
    digest = hashlib.sha256(_FORMAT.encode())
    config = json.loads((folder / "config.json").read_text())
    _add(digest, "config", json.dumps({k: v for k, v in config.items() if k not in _VOLATILE}, sort_keys=True).encode())
    for name in _TOKENIZER_FILES:
        if (tokenizer_folder / name).is_file():
            _add(digest, name, (tokenizer_folder / name).read_bytes())
    files = weight_files(folder)
    for path in files:
        _add(digest, path.name, bytes.fromhex(sampled_digest(path, _MAX_BLOCKS // len(files) or 1)))
    if model.trust_remote_code:  # then the model's own code computes its answers
        for path in sorted(folder.glob("*.py")):
            _add(digest, path.name, path.read_bytes())
    held = (dtype, model.quantization, model.llm_int8_threshold if model.quantization == "bnb-int8" else None)
    _add(digest, "held", json.dumps(held).encode())
    if angles:
        _add(digest, "angles", angles.encode())
    return Fingerprint(digest.hexdigest()[:32])


def sampled_digest(path: Path, max_blocks: int = _MAX_BLOCKS) -> str:
    """SHA-256 (hex) over a file's size, its header or first block, and up to `max_blocks` blocks of 4 KiB within it."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(header_bytes(path) if is_safetensors(path) else _BLOCK_BYTES))
        for offset in _spread(_offsets(path, size), max_blocks):
            file.seek(offset)
            digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()


def _offsets(path: Path, size: int) -> list[int]:
    """Where to look: the middle of every tensor and the end; for other formats evenly spaced blocks."""
    last = max(size - _BLOCK_BYTES, 0)
    if not is_safetensors(path):
        return [last * i // (_MAX_BLOCKS - 1) for i in range(_MAX_BLOCKS)]
    start = header_bytes(path)
    return [*sorted(start + (t.begin + t.end) // 2 for t in tensors(path)), last]


def _spread(offsets: list[int], limit: int) -> Iterator[int]:
    """At most `limit` of the offsets, evenly chosen, the last among them."""
    step = max(len(offsets) / limit, 1.0)
    count = min(len(offsets), limit)
    yield from dict.fromkeys(offsets[len(offsets) - 1 - int(i * step)] for i in range(count))


def _add(digest: hashlib._Hash, name: str, data: bytes) -> None:
    digest.update(f"{name}:{len(data)}:".encode())
    digest.update(data)
