"""Small tokenizers of the two families, made here, and a template for them."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from serve_app.chat.tokenizer import ChatTokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog, again and again.\n\n1. One 2. Two",
    "Größe, naïve café; 你好，世界。 привет мир. こんにちは 🙂🙂 👩‍👩‍👧 é",
    "def f(x): return x < 3 and x > 1 or [INST] assistant user system",
] * 20

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + (' ' + m['name'] if m['name'] else '') + '\n' "
    "+ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level_backend() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=CHATML_SPECIALS, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    return tokenizer


def metaspace_backend() -> Tokenizer:
    """As Llama's: spaces are ▁, one put before the text; what the vocabulary lacks becomes byte tokens."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    trainer = trainers.BpeTrainer(vocab_size=300, limit_alphabet=60, special_tokens=["<unk>"], show_progress=False)
    trained.train_from_iterator(CORPUS, trainer)
    learned = json.loads(trained.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [token for token in learned["vocab"] if token not in names]
    return llama_like({name: index for index, name in enumerate(names)}, learned["merges"])


def llama_like(vocab: dict[str, int], merges: list[list[str]]) -> Tokenizer:
    tokenizer = Tokenizer(
        models.BPE(vocab, [(a, b) for a, b in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    return tokenizer


def chat_tokenizer(folder: Path, template: str) -> ChatTokenizer:
    """A byte-level tokenizer with this chat template, saved in `folder`."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_backend(), eos_token="<|im_end|>", unk_token="<|endoftext|>"
    )
    fast.chat_template = template
    fast.save_pretrained(folder)
    return ChatTokenizer.load(folder)
