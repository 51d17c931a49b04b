"""Prompts for the text between two others, by the tokens of each family; the orders are those of its reference code."""

from __future__ import annotations

import pytest
from small_tokenizers import byte_level_backend, metaspace_backend
from tokenizers import AddedToken, Tokenizer

from serve_app.chat.gaps import gap_format
from serve_app.chat.prompt_error import PromptError
from serve_app.chat.prompts import PromptFormatter
from serve_app.chat.tokenizer import ChatTokenizer
from serve_app.config import ChatConfig

PREFIX, SUFFIX = "def f(x): return ", "\nThe quick <|fim_middle|> fox"


def tokenizer_with(backend: Tokenizer, *tokens: str, **special_tokens: str) -> ChatTokenizer:
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in tokens])
    return ChatTokenizer(
        backend.to_str(),
        control_tokens=[*tokens, *special_tokens.values()],
        template=None,
        special_tokens=special_tokens,
        adds_bos="bos_token" in special_tokens,
    )


@pytest.mark.parametrize(
    ("tokens", "order"),
    [
        (("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"), "0p1s2"),
        (("<fim_prefix>", "<fim_suffix>", "<fim_middle>"), "0p1s2"),
        (("<fim-prefix>", "<fim-suffix>", "<fim-middle>"), "0p1s2"),
        (("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"), "0p1s2"),
        (("[SUFFIX]", "[PREFIX]"), "0s1p"),
    ],
)
def test_each_family_has_its_order(tokens: tuple[str, ...], order: str) -> None:
    tokenizer = tokenizer_with(byte_level_backend(), *tokens)
    made = gap_format(tokenizer)
    assert made is not None
    parts = {str(index): [tokenizer.token_id(token)] for index, token in enumerate(tokens)}
    for name, text in (("p", PREFIX), ("s", SUFFIX)):
        parts[name] = list(tokenizer.encode_text(text, add_bos=False, parse_special=False))
    ids = made.encode(PREFIX, SUFFIX, parse_special=False)
    assert ids == [token_id for name in order for token_id in parts[name]]
    assert sum(token_id in tokenizer.control_ids for token_id in ids) == len(tokens), "no text became a control token"
    assert made.ends == ()


def test_code_llama_has_bos_no_space_before_the_suffix_and_an_end_of_its_own() -> None:
    marks = ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>")
    tokenizer = tokenizer_with(metaspace_backend(), *marks, bos_token="<s>", eos_token="</s>")
    made = gap_format(tokenizer)
    assert made is not None
    pre, suf, mid, eot = map(tokenizer.token_id, marks)
    ids = made.encode("quick", "quick", parse_special=False)
    assert (ids[0], ids[1], ids[-1]) == (tokenizer.bos_token_id, pre, mid)
    middle = ids.index(suf)
    prefix, suffix = ids[2:middle], ids[middle + 1 : -1]
    assert tokenizer.token_at(prefix[0]).startswith("▁")  # type: ignore[union-attr]
    assert not tokenizer.token_at(suffix[0]).startswith("▁")  # type: ignore[union-attr]
    assert made.ends == (eot,)


def test_empty_texts_leave_their_marks_alone() -> None:
    tokenizer = tokenizer_with(byte_level_backend(), "<fim_prefix>", "<fim_suffix>", "<fim_middle>")
    made = gap_format(tokenizer)
    assert made is not None
    assert len(made.encode("", "x", parse_special=False)) == 4


def test_a_model_without_such_tokens_refuses() -> None:
    formatter = PromptFormatter(tokenizer_with(byte_level_backend(), "<fim_prefix>", "<fim_suffix>"), ChatConfig())
    with pytest.raises(PromptError) as refused:
        formatter.render_gap("a", "b")
    assert (refused.value.code, refused.value.param) == ("unsupported_parameter", "suffix")


def test_a_gap_too_large_for_the_context_is_refused() -> None:
    tokenizer = tokenizer_with(byte_level_backend(), "<fim_prefix>", "<fim_suffix>", "<fim_middle>")
    formatter = PromptFormatter(tokenizer, ChatConfig())
    ids, ends = formatter.render_gap("fox", "dog", context_tokens=10)
    assert (len(ids) < 10, ends) == (True, ())
    for text in ("fox " * 20, "x" * 10_000):
        with pytest.raises(PromptError, match="maximum context length"):
            formatter.render_gap(text, "dog", context_tokens=10)
