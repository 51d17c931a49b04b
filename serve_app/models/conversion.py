"""Turns GGUF into a folder that transformers loads: float32 safetensors, tokenizer, chat template, generation settings.

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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from serve_app.core import LoadStage
from serve_app.models.cache import Progress, disk_error, require_space
from serve_app.models.completeness import require_complete
from serve_app.models.gguf_files import GGUFContents, gguf_parts, read_gguf, write_whole
from serve_app.models.model_error import ModelError
from serve_app.transformers_internals import gguf_tensor_names, reports_gguf_tensors

CONVERSION_VERSION = "3"
"""Part of the version of every converted folder: raise it when the result changes."""

_DIGIT_SPLITTING = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
"""Values of `tokenizer.ggml.pre` that mean: each digit apart, then GPT-2's pattern (llama.cpp, src/llama-vocab.cpp)."""
_GPT2_SPLITTING = frozenset({"gpt-2", "mpt", "olmo", "jais"})
"""Values of `tokenizer.ggml.pre` that mean GPT-2's pattern alone, on which transformers falls back."""
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
                process.wait()  # before `with` closes its stdin, which would end it
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
            notes = convert_here(gguf, folder, lambda stage: say(stage=stage.stage, fraction=stage.fraction))
            say(notes=notes)
        except ModelError as error:
            say(error=str(error))
        except OSError as error:
            say(error=str(disk_error(folder, error)))


def convert_here(gguf: Path, folder: Path, progress: Progress) -> tuple[str, ...]:
    """What `convert` does, in this process. Raises `ModelError`, OSError, and what transformers raises."""
    progress(LoadStage("converting GGUF weights (only once)", 0.0))
    contents = read_gguf(gguf_parts(gguf))
    with _as_one_file(gguf, contents, folder) as whole:
        context_tokens = _convert_weights(whole, contents, folder)
        progress(LoadStage("converting GGUF tokenizer (only once)", 0.9))
        notes = tuple(_convert_tokenizer(whole, contents, folder, context_tokens))
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(0o644)  # safetensors writes 0600; a cache may be shared
    return notes


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


@contextmanager
def _as_one_file(gguf: Path, contents: GGUFContents, folder: Path) -> Iterator[Path]:
    """A model as the one file that transformers reads: `gguf` itself, or a temporary file with all of its parts."""
    weights_bytes = 4 * sum(int(tensor.n_elements) for tensor in contents.tensors)
    if len(contents.readers) == 1:
        require_space(folder, weights_bytes)
        yield gguf
        return
    require_space(folder, weights_bytes + sum(int(tensor.n_bytes) for tensor in contents.tensors))
    with tempfile.TemporaryDirectory(dir=folder) as work:
        whole = Path(work) / gguf.name
        write_whole(contents, whole)
        yield whole


def _convert_weights(gguf: Path, contents: GGUFContents, folder: Path) -> int:
    """Writes weights, config.json and generation_config.json; returns the model's context in tokens."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, GgufConfig

    from serve_app.models.gguf_settings import gguf_config, sampling_settings

    factory: Any = AutoModelForCausalLM  # its methods carry no types
    config = gguf_config(gguf, contents)
    _require_every_tensor(gguf.name, contents, config)
    model, report = factory.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        config=config,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),  # without it the result can't be saved
        output_loading_info=True,
    )
    require_complete(gguf.name, model, report)
    keys = (*_END_OF_TURN_KEYS, "bos_token_id", "padding_token_id")
    said = {key: contents.fields.get(f"tokenizer.ggml.{key}") for key in keys}
    ids = {key: int(value) for key, value in said.items() if value is not None}
    eos_token_ids = sorted({ids[key] for key in _END_OF_TURN_KEYS if key in ids})
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=ids.get("bos_token_id"),
        eos_token_id=eos_token_ids or None,
        pad_token_id=ids.get("padding_token_id"),
        **sampling_settings(contents),
    )
    model.save_pretrained(folder)
    return int(config.max_position_embeddings)


def _require_every_tensor(name: str, contents: GGUFContents, config: Any) -> None:
    """Raise `ModelError` when the file lacks a tensor of the model, or has one that the model has no place for.

    transformers would fill the first with random numbers and leave out the second: both change the model.
    """
    from serve_app.models.gguf_settings import ROPE_TENSORS
    from serve_app.models.support import check_config, without_weights

    check_config(config)
    if reports_gguf_tensors(contents.architecture):
        return
    model = without_weights(config)
    places = gguf_tensor_names(model, contents.architecture)
    tied = set(model.all_tied_weights_keys)
    names = {key if key.endswith((".weight", ".bias")) else f"{key}.weight": place for key, place in places.items()}
    present = {tensor.name for tensor in contents.tensors}
    if missing := sorted(key for key, place in names.items() if key not in present and place not in tied):
        raise ModelError(
            f"{name} lacks {len(missing)} of the model's tensors, e.g. {missing[0]}; fetch the whole file, or all of "
            "its parts."
        )
    if unread := sorted(present - set(names) - ROPE_TENSORS):
        raise ModelError(
            f"{name} holds tensors that transformers' {type(model).__name__} does not use, e.g. {unread[0]}. Without "
            "them the model's answers would be wrong; use the original checkpoint."
        )


def _convert_tokenizer(gguf: Path, contents: GGUFContents, folder: Path, context_tokens: int) -> list[str]:
    """Writes the tokenizer and its chat template; returns notes on what the file's format has lost."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    backend = tokenizer.backend_tokenizer
    notes = []
    name = contents.fields.get("tokenizer.ggml.pre")
    if name in _DIGIT_SPLITTING:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif (
        contents.fields.get("tokenizer.ggml.model") == "gpt2"
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


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]))
