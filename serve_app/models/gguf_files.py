"""A GGUF model as files: which parts it has, whether all of them are there and whole, and one file made of several.

Reads headers only, but for what it writes. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve_app.models.model_error import ModelError

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
"""How llama.cpp (`llama_split_path`), and so everybody, names the parts of a model."""


@dataclass(frozen=True, slots=True)
class GGUFContents:
    """What the headers of a model's parts say together."""

    fields: dict[str, Any]
    """Key -> value, an array as a list. With several parts, the fields of the first one."""
    tensors: list[Any]
    """gguf's own `ReaderTensor`s of all parts; their data stays mapped from the files."""
    readers: list[Any]
    """gguf's own readers, one a part."""

    @property
    def architecture(self) -> str:
        """As llama.cpp calls it, e.g. `llama`; empty when the file says none."""
        return str(self.fields.get("general.architecture", ""))


def gguf_name(gguf: Path) -> str:
    """The model's name: that of its file without the suffix and a part's number."""
    match = _PART.fullmatch(gguf.name)
    return match["stem"] if match else gguf.stem


def gguf_parts(gguf: Path) -> list[Path]:
    """The files, in order, of the model that `gguf` is or is a part of. Raises `ModelError` when a part is missing."""
    match = _PART.fullmatch(gguf.name)
    if match is None:
        return [gguf]
    suffix = gguf.suffix
    count = int(match["count"])
    parts = [gguf.with_name(f"{match['stem']}-{i:05}-of-{match['count']}{suffix}") for i in range(1, count + 1)]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise ModelError(
            f"{gguf.parent} lacks {', '.join(missing[:5])}{' and more' * (len(missing) > 5)} of the {count} parts of "
            f"{match['stem']}; fetch all of them into one folder."
        )
    return parts


def read_gguf(parts: list[Path]) -> GGUFContents:
    """The headers of a whole model. Raises `ModelError` for a file that is cut off or doesn't belong to the others."""
    readers = [_read(part) for part in parts]
    fields = [{key: field.contents() for key, field in reader.fields.items()} for reader in readers]
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    for number, (part, own) in enumerate(zip(parts, fields, strict=True)):
        if (own.get("split.count") or 1) != len(parts) or (own.get("split.no") or 0) != number:
            raise ModelError(
                f"{part.name} says that it is part {own.get('split.no', 0) + 1} of {own.get('split.count', 1)} of a "
                f"model; give all parts in one folder, named as llama.cpp does (NAME-00001-of-00003.gguf)."
            )
    names = [tensor.name for tensor in tensors]
    if len(set(names)) != len(names):
        raise ModelError(f"{parts[0].name}: its parts hold the same tensors twice; fetch the model again.")
    expected = fields[0].get("split.tensors.count")
    if expected is not None and expected != len(tensors):
        raise ModelError(
            f"{parts[0].name} and its parts hold {len(tensors)} tensors of {expected}; fetch the model again."
        )
    return GGUFContents(fields[0], tensors, readers)


def write_whole(contents: GGUFContents, path: Path) -> None:
    """Write one file with all that the parts hold, for a reader that takes only one. Copies the tensors' bytes."""
    from gguf import GGUFValueType, GGUFWriter

    writer = GGUFWriter(path, contents.architecture, endianess=contents.readers[0].endianess)
    for key, field in contents.readers[0].fields.items():
        # `split.` keys describe a part; the writer itself takes care of the others.
        if key.startswith(("split.", "GGUF.")) or key in ("general.architecture", "general.alignment"):
            continue
        kind = field.types[0]
        element = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), kind, sub_type=element)
    for tensor in contents.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_shape=tensor.data.shape, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _read(part: Path) -> Any:
    from gguf import GGUFReader

    try:
        return GGUFReader(part)  # maps each tensor, and so fails for one that is cut off
    except (ValueError, IndexError, KeyError) as error:
        said = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{part.name} can't be converted: it is cut off or no GGUF file that is known here ({said}); fetch the "
            "file again."
        ) from error
