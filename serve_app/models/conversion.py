"""GGUF to a folder that transformers loads: float32 safetensors, tokenizer, chat template, generation settings.

Works in a process of its own (`python -m serve_app.models.conversion GGUF FOLDER`), since it needs twice the memory
of the weights and frees it best by ending. Knows no cache and no network.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from serve_app.messages import LoadStage
from serve_app.models.cache import Progress, disk_error, require_space
from serve_app.models.errors import ModelError

CONVERSION_VERSION = "1"
"""Part of the version of every converted folder: raise it when the result changes."""

_DIGIT_SPLITTING = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
"""Values of `tokenizer.ggml.pre` that mean: each digit apart, then GPT-2's pattern (llama.cpp, src/llama-vocab.cpp)."""
_GPT2_SPLITTING = frozenset({"gpt-2", "mpt", "olmo", "jais"})
"""Those that mean GPT-2's pattern alone, which is what transformers falls back on."""
_END_OF_TURN_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
"""GGUF keys under `tokenizer.ggml.` of ids that end an answer."""


def convert(gguf: Path, folder: Path, progress: Progress) -> tuple[str, ...]:
    """Write the converted model into the existing `folder`; returns notes for the user.

    Raises `ModelError` with what the converting process said last, and OSError when it can't be started.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TQDM_DISABLE": "1",
    }
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(
            [sys.executable, "-m", __name__, str(gguf), str(folder)],
            stdin=subprocess.PIPE,  # stays open: its end tells the child that this process has died
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        ) as process:
            try:
                notes = _follow(process, progress)
                process.wait()  # before leaving closes its stdin
            except BaseException:
                process.kill()
                raise
        if process.returncode == 0:
            return notes
        errors.seek(0)
        last = next((line for line in reversed(errors.read().splitlines()) if line.strip()), "")
    reason = last.strip() or f"its process ended with {process.returncode}, perhaps for want of memory"
    raise ModelError(f"{gguf.name} can't be converted: {reason}")


def _follow(process: subprocess.Popen[str], progress: Progress) -> tuple[str, ...]:
    """Pass the child's stages on; returns the notes it ends with."""
    assert process.stdout is not None
    notes: tuple[str, ...] = ()
    for line in process.stdout:
        message = json.loads(line)
        if "stage" in message:
            progress(LoadStage(message["stage"], message["fraction"]))
        elif "error" in message:
            raise ModelError(message["error"])
        else:
            notes = tuple(message["notes"])
    return notes


def _main(gguf: Path, folder: Path) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with os.fdopen(os.dup(1), "w") as replies:
        os.dup2(2, 1)  # what libraries print must not mix with the replies

        def say(**message: Any) -> None:
            print(json.dumps(message), file=replies, flush=True)

        try:
            say(stage="converting GGUF weights (only once)", fraction=0.0)
            context_tokens = _convert_weights(gguf, folder)
            say(stage="converting GGUF tokenizer (only once)", fraction=0.9)
            notes = _convert_tokenizer(gguf, folder, context_tokens)
            for path in folder.iterdir():
                if path.is_file():
                    path.chmod(0o644)  # safetensors writes 0600; a cache may be shared
            say(notes=notes)
        except ModelError as error:
            say(error=str(error))
        except OSError as error:
            say(error=str(disk_error(folder, error)))


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def _convert_weights(gguf: Path, folder: Path) -> int:
    """Writes weights, config.json and generation_config.json; returns the model's context in tokens."""
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, GenerationConfig, GgufConfig

    require_space(folder, 4 * sum(int(tensor.n_elements) for tensor in GGUFReader(gguf).tensors))
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),  # without it the result can't be saved
    )
    config = model.config
    if hasattr(config, "rms_norm_eps"):
        config.rms_norm_eps = _shortest_decimal(config.rms_norm_eps)
    ids = _token_ids(gguf)
    eos_token_ids = sorted({ids[key] for key in _END_OF_TURN_KEYS if key in ids})
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=ids.get("bos_token_id"),
        eos_token_id=eos_token_ids or None,
        pad_token_id=ids.get("padding_token_id"),
    )
    model.save_pretrained(folder)
    return int(config.max_position_embeddings)


def _convert_tokenizer(gguf: Path, folder: Path, context_tokens: int) -> list[str]:
    """Writes the tokenizer and its chat template; returns notes on what the file's format has lost."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    backend = tokenizer.backend_tokenizer
    notes = []
    name = _text_field(gguf, "tokenizer.ggml.pre")
    if name in _DIGIT_SPLITTING:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif (
        _text_field(gguf, "tokenizer.ggml.model") == "gpt2"
        and name not in _GPT2_SPLITTING
        and isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel)
    ):
        notes.append(
            f"The GGUF file's pre-tokenizer {name!r} is not known here and GPT-2's is used: some text may be encoded "
            "in other tokens than the model was trained with. Set model.tokenizer to the original model's."
        )
    tokenizer.model_max_length = context_tokens
    tokenizer.save_pretrained(folder)
    return notes


def _shortest_decimal(value: float) -> float:
    """GGUF keeps float32: 9.999999747378752e-06 is 1e-05 again."""
    import numpy as np

    return float(str(np.float32(value)))


def _text_field(gguf: Path, key: str) -> str | None:
    value = _field(gguf, key)
    return None if value is None else str(value)


def _token_ids(gguf: Path) -> dict[str, int]:
    keys = (*_END_OF_TURN_KEYS, "bos_token_id", "padding_token_id")
    values = {key: _field(gguf, f"tokenizer.ggml.{key}") for key in keys}
    return {key: int(value) for key, value in values.items() if value is not None}


def _field(gguf: Path, key: str) -> Any:
    from gguf import GGUFReader

    field = GGUFReader(gguf).get_field(key)
    return None if field is None else field.contents()


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]))
