"""Tiny random models for the tests of this room: a Llama, its byte-level tokenizer, and the same shape as GGUF."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from gguf import GGUFWriter, TokenType
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from serve_app.core import LoadStage

BYTE_TOKENS = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = [("Ċ", "Ċ"), ("1", "2"), ("h", "i")]


def ignore_progress(_: LoadStage) -> None:
    """For tests that don't look at progress."""


def tiny_config(**changes: object) -> LlamaConfig:
    """2 layers, 4 heads on 2 KV heads of width 8, 300 ids, context 64."""
    settings: dict[str, object] = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaConfig(**{**settings, **changes})


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with three merges; ids below 300."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *BYTE_TOKENS, *(a + b for a, b in MERGES)])}
    backend = Tokenizer(models.BPE(vocabulary, MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL_TOKENS)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>")


def write_gguf(
    path: Path,
    *,
    pre: str = "smollm",
    architecture: str = "llama",
    without: str = "",
    more: Mapping[str, np.ndarray[Any, Any]] = MappingProxyType({}),
    settings: Callable[[GGUFWriter], None] = lambda _: None,
    tensors_a_part: int = 0,
) -> Path:
    """A tiny random Llama as a GGUF file, float32, with the tokenizer's pieces in it.

    `without` is a tensor to leave out, `more` are ones to add, `settings` adds keys; `tensors_a_part` makes it several
    files, of which the first is returned.
    """
    random = np.random.default_rng(0)
    writer = GGUFWriter(path, architecture, split_max_tensors=tensors_a_part)
    writer.add_context_length(64)
    writer.add_block_count(2)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = [*SPECIAL_TOKENS, *BYTE_TOKENS, *(a + b for a, b in MERGES)]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges([f"{a} {b}" for a, b in MERGES])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")

    def add(name: str, *shape: int) -> None:
        values = random.standard_normal(shape, dtype=np.float32) * 0.1
        if name != without:
            writer.add_tensor(name, values)

    add("token_embd.weight", len(tokens), 32)
    add("output_norm.weight", 32)
    for layer in range(2):
        for name, shape in {
            "attn_norm": (32,),
            "attn_q": (32, 32),
            "attn_k": (16, 32),
            "attn_v": (16, 32),
            "attn_output": (32, 32),
            "ffn_norm": (32,),
            "ffn_gate": (64, 32),
            "ffn_up": (64, 32),
            "ffn_down": (32, 64),
        }.items():
            add(f"blk.{layer}.{name}.weight", *shape)
    for name, values in more.items():
        writer.add_tensor(name, values)
    settings(writer)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return min(path.parent.glob(f"{path.stem}-00001-of-*.gguf")) if tensors_a_part else path
