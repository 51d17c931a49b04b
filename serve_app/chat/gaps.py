"""Prompts for an answer between two texts (fill-in-the-middle), by the tokens of the model's family.

Promises that no text becomes one of these tokens, unless its caller says that control tokens in it are to be read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from serve_app.chat.tokenizer import ChatTokenizer


class _Family(NamedTuple):
    """The tokens around the two texts, in the order in which the family was trained on them."""

    before_first: str
    before_second: str
    last: str | None
    """After the second text; None: the answer follows it."""
    suffix_first: bool = False
    ends: str | None = None
    """The token with which the model ends such an answer, if that is not its EOS."""


_FAMILIES = (
    # Qwen2.5-Coder and CodeGemma (their technical reports: arXiv 2409.12186, 2406.11409)
    _Family("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    # StarCoder, StarCoder2, Granite Code (arXiv 2305.06161)
    _Family("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    # SantaCoder
    _Family("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    # DeepSeek-Coder and DeepSeek-V2/V3 (github.com/deepseek-ai/DeepSeek-Coder)
    _Family("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    # Code Llama (github.com/meta-llama/codellama, infilling_prompt_tokens)
    _Family("▁<PRE>", "▁<SUF>", "▁<MID>", ends="▁<EOT>"),
    # Codestral (mistral-common, encode_fim)
    _Family("[SUFFIX]", "[PREFIX]", None, suffix_first=True),
)


@dataclass(frozen=True, slots=True)
class GapFormat:
    """How one model is asked for the text of a gap."""

    tokenizer: ChatTokenizer
    marks: tuple[int, int, int | None]
    """The ids before the first text, before the second one and, if there is one, after it."""
    suffix_first: bool
    ends: tuple[int, ...]
    """Ids that end the answer, besides EOS."""

    def encode(self, prefix: str, suffix: str, *, parse_special: bool) -> list[int]:
        """The ids of the prompt, BOS included where the model's prompts begin with one. Raises `PromptError`."""
        tokenizer, (before_first, before_second, last) = self.tokenizer, self.marks
        texts = (suffix, prefix) if self.suffix_first else (prefix, suffix)
        ids = [tokenizer.bos_token_id] if tokenizer.adds_bos and tokenizer.bos_token_id is not None else []
        for mark, text, first in zip((before_first, before_second), texts, (True, False), strict=True):
            ids += [mark, *tokenizer.encode_apart(text, first=first, parse_special=parse_special)]
        return ids if last is None else [*ids, last]


def gap_format(tokenizer: ChatTokenizer) -> GapFormat | None:
    """The format of the model with this tokenizer; None if it has no tokens for gaps."""
    for family in _FAMILIES:
        before_first, before_second = map(tokenizer.token_id, (family.before_first, family.before_second))
        last = None if family.last is None else tokenizer.token_id(family.last)
        if before_first is None or before_second is None or (last is None) != (family.last is None):
            continue
        end = None if family.ends is None else tokenizer.token_id(family.ends)
        marks = before_first, before_second, last
        return GapFormat(tokenizer, marks, family.suffix_first, () if end is None else (end,))
    return None
