import json
import os
import shutil
from pathlib import Path

from serve_app.config import ModelConfig
from serve_app.models.checkpoint import header_bytes, tensors, weight_files
from serve_app.models.fingerprint import fingerprint, sampled_digest


def _of(folder: Path, dtype: str = "float32", **model: object) -> str:
    return fingerprint(folder, folder, ModelConfig(**model), dtype)


def test_same_files_elsewhere_have_the_same_fingerprint(llama_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "another place" / "name"
    shutil.copytree(llama_folder, copy, copy_function=shutil.copy)
    for path in copy.iterdir():
        os.utime(path, (1, 1))
    config = json.loads((copy / "config.json").read_text())
    config["transformers_version"] = "9.9.9"
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "README.md").write_text("hello")
    assert _of(copy) == _of(llama_folder)


def test_any_tensor_changed_as_a_whole_is_seen(llama_folder: Path) -> None:
    before = _of(llama_folder)
    for path in weight_files(llama_folder):
        original = path.read_bytes()
        for entry in tensors(path):
            begin, end = header_bytes(path) + entry.begin, header_bytes(path) + entry.end
            path.write_bytes(original[:begin] + bytes(b ^ 1 for b in original[begin:end]) + original[end:])
            assert _of(llama_folder) != before, entry.name
        path.write_bytes(original)
    assert _of(llama_folder) == before


def test_what_else_makes_other_tokens_is_seen(llama_folder: Path) -> None:
    base = _of(llama_folder)
    seen = {
        base,
        _of(llama_folder, dtype="bfloat16"),
        _of(llama_folder, quantization="bnb-int8"),
        _of(llama_folder, quantization="bnb-int8", llm_int8_threshold=6.0),
        _of(llama_folder, quantization="bnb-nf4"),
    }
    tokenizer = llama_folder / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("Digits", "Digit") + " ")
    seen.add(_of(llama_folder))
    config = json.loads((llama_folder / "config.json").read_text())
    (llama_folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    seen.add(_of(llama_folder))
    assert len(seen) == 7
    assert _of(llama_folder, llm_int8_threshold=6.0) in seen  # it means nothing without bnb-int8


def test_other_formats_are_sampled_evenly(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    size = 4096 * 3000
    with path.open("wb") as file:
        file.truncate(size)
    empty = sampled_digest(path)
    for offset in (0, size // 2, size - 1):
        with path.open("r+b") as file:
            file.seek(max(offset - 8192, 0))
            file.write(b"\x01" * min(16384, size - max(offset - 8192, 0)))
        changed = sampled_digest(path)
        assert changed != empty
        empty = changed
